"""Options and arguments that several commands have, and the decorator that makes a command of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import click

from flows.command_group import Command, chosen_verbosity
from flows.completion_values import setting_values
from flows.terminal import quiet_stdout
from flows.verbosity import showing
from mlorq.errors import hide_secrets

Finish = Callable[[], int]  # prints a command's result and returns the exit status
Arguments = SimpleNamespace  # a command's name, its values by name, and `interrupted`, which Ctrl-C sets
Function = TypeVar("Function", bound=Callable[..., Any])

PATH = click.Path()  # of a file, a folder or an fsspec URL; shells complete paths


class RegistryOption(click.Option):
    """An option whose help lists what is registered when help is asked for.

    Args:
        about: gives the help text.
    """

    def __init__(self, *args: Any, about: Callable[[], str], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.about = about

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = self.about()
        return super().get_help_record(ctx)


def command(function: Callable[[Arguments], Finish]) -> Command:
    """A command that computes with standard output redirected, and then prints its result on standard output."""

    @click.pass_context
    def call(context: click.Context, /, **values: Any) -> int:
        name = context.command_path.partition(" ")[2]
        arguments = Arguments(command=name, interrupted=context.obj, **values)
        with showing(chosen_verbosity(context)):
            with quiet_stdout():
                finish = function(arguments)
            return finish()

    # Decorators are applied from the bottom up.
    parameters = list(reversed(getattr(function, "__click_params__", [])))
    return Command(function.__name__, callback=call, params=parameters)


def json_option(function: Function) -> Function:
    """``--json``."""
    return click.option("--json", is_flag=True, help="print one JSON object")(function)


def checkpoint_argument(function: Function) -> Function:
    """``CHECKPOINT``."""
    return click.argument("checkpoint", metavar="CHECKPOINT", type=PATH)(function)


def configured(function: Function) -> Function:
    """``CONFIG`` and ``--set``."""
    option = click.option(
        "--set",
        multiple=True,
        callback=settings,
        metavar="KEY=VALUE",
        help="override a key, as in search.samples=32 (the value is YAML); can be repeated",
        shell_complete=setting_values,
    )
    return click.argument("config", metavar="CONFIG", type=PATH)(option(function))


def budgeted(function: Function) -> Function:
    """``--budget``."""
    return click.option(
        "--budget",
        multiple=True,
        metavar="B",
        help='overrides the configuration\'s budget: "3bit", "12.5%", "25MB"; can be repeated',
    )(function)


def stored(function: Function) -> Function:
    """``[CONFIG]`` and ``--store``: one of them names the store."""
    option = click.option("--store", metavar="URL", type=PATH, help="URL of the store, in place of a configuration")
    return click.argument("config", required=False, metavar="[CONFIG]", type=PATH)(option(function))


def settings(ctx: click.Context, option: click.Parameter, values: Iterable[str]) -> list[tuple[str, str]]:
    """The callback of an option with values ``KEY=VALUE``: keys with the texts of their values.

    Raises:
        click.BadParameter: a value has another form.
    """
    found = []
    for text in values:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise click.BadParameter(f"{hide_secrets(text)!r}: expected KEY=VALUE", ctx, option)
        found.append((key.strip(), value.strip()))
    return found
