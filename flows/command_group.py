"""The classes of commands: modules are imported on demand, and mistakes are answered with the nearest valid name.

Options may be abbreviated as long as they are unique. ``--quiet``, ``--verbose`` and ``--log-level`` stand before or
after the name of a command.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from flows.verbosity import LEVELS, Verbosity

COMPLETION = "_MLORQ_COMPLETE"  # environment variable that the scripts of ``mlorq completion`` set

_NUMBER = re.compile(r"-(\d+|\d*\.\d+)")
_SHOWN = "mlorq.verbosity"  # key of ``meta``, which the contexts of a command and its groups share
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Command(click.Command):
    """A command."""

    def __init__(self, name: str, **keywords: Any) -> None:
        super().__init__(name, context_settings=_SETTINGS, **keywords)
        self.params = [*self.params, *_verbosity_options()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Shells ask for completions of lines that are not finished.
        return super().parse_args(ctx, args if ctx.resilient_parsing else _written_out(self, ctx, args))

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, " ".join(self.collect_usage_pieces(ctx)), prefix="usage: ")


class Home(NamedTuple):
    """Where a command is defined.

    Attributes:
        module: it holds a command of the same name.
        about: one line for help.
    """

    module: str
    about: str


class Group(Command, click.Group):
    """A command of commands.

    Args:
        name: of the group.
        homes: its commands; their modules are imported when they are used, not for help or completion.
    """

    def __init__(self, name: str, homes: Mapping[str, Home], **keywords: Any) -> None:
        super().__init__(name, no_args_is_help=False, subcommand_metavar="COMMAND ...", **keywords)
        self.homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = self.homes.get(cmd_name)
        if home is None:
            return None
        command: click.Command = getattr(importlib.import_module(home.module), cmd_name)
        command.help = home.about
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.homes and not ctx.resilient_parsing:
            raise click.UsageError(f"unknown command {args[0]!r}; {suggestion(args[0], self.homes)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, home.about) for name, home in self.homes.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.homes if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self.homes[name].about) for name in names]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]


def suggestion(name: str, known: Iterable[str]) -> str:
    """``did you mean 'compress'?``, or all names if none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


# -- verbosity --------------------------------------------------------------------------------------------------


def chosen_verbosity(ctx: click.Context) -> Verbosity:
    """What the options before and after the command's name ask for.

    Raises:
        click.UsageError: they contradict each other.
    """
    chosen = Verbosity(**ctx.meta.get(_SHOWN, {}))
    if chosen.quiet and chosen.verbose:
        raise click.UsageError("--quiet and --verbose exclude each other", ctx)
    return chosen


def _verbosity_options() -> list[click.Option]:
    def remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        if value:
            ctx.meta.setdefault(_SHOWN, {})[option.name] = value

    quiet = click.Option(
        ["--quiet"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="show the result and errors alone",
    )
    verbose = click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="show Prefect's log as well",
    )
    level = click.Option(
        ["--log-level", "level"],
        type=click.Choice(LEVELS, case_sensitive=False),
        metavar="LEVEL",
        expose_value=False,
        callback=remember,
        help="show log lines of this level and above, Prefect's included: " + ", ".join(LEVELS),
    )
    return [quiet, verbose, level]


# -- options as they are typed ------------------------------------------------------------------------------------


def _written_out(command: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
    """Arguments with abbreviated options written out.

    Raises:
        click.UsageError: an option is unknown or ambiguous, or its value is missing.
    """
    options = {
        name: option
        for option in command.get_params(ctx)
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--")
    }
    found: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if argument == "--" or (isinstance(command, click.Group) and not argument.startswith("-")):
            return [*found, argument, *rest]  # the others are values, or belong to another command
        if not argument.startswith("--"):
            found.append(argument)
            continue
        typed, equals, value = argument.partition("=")
        name = _option(typed, list(options), ctx)
        found.append(name + equals + value)
        if not options[name].is_flag and not equals:
            if not rest or (rest[0].startswith("-") and not _may_be_value(rest[0])):
                raise click.UsageError(f"option {name} needs a value", ctx)
            found.append(rest.pop(0))
    return found


def _option(typed: str, known: list[str], ctx: click.Context) -> str:
    matching = [typed] if typed in known else [name for name in known if name.startswith(typed)]
    if len(matching) > 1:
        raise click.UsageError(f"option {typed} is ambiguous: {', '.join(matching)}", ctx)
    if not matching:
        raise click.UsageError(f"unknown option {typed}; {suggestion(typed, known)}", ctx)
    return matching[0]


def _may_be_value(text: str) -> bool:
    """Whether a text with a dash in front is a value: a dash alone, a number, or a text of several words."""
    return text == "-" or " " in text or _NUMBER.fullmatch(text) is not None
