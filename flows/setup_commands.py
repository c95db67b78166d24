"""Commands that a user starts with: a configuration, its schema, the models that are known to work."""

from __future__ import annotations

import json
from pathlib import Path

import click

from flows.command_tools import print_json, print_text
from flows.completion_values import families
from flows.options import PATH, Arguments, Finish, RegistryOption, command, json_option
from flows.verbosity import say
from mlorq.errors import ConfigError

SCHEMA_FILE = "mlorq.schema.json"


def _about_families() -> str:
    from mlorq.models.family import FAMILIES

    return ", ".join(f"{family.name}:{family.example().named}" for family in FAMILIES) + "; default: the first"


@command
@click.argument("path", required=False, metavar="[PATH]", type=PATH)
@click.option(
    "--model",
    metavar="FAMILY[:NAME]",
    cls=RegistryOption,
    about=_about_families,
    shell_complete=families,
)
def init(arguments: Arguments) -> Finish:
    """Write or print a configuration."""
    from flows.template import template

    text = template(arguments.model)
    if arguments.path is None:
        return lambda: print_text(text)
    path = Path(arguments.path)
    if path.with_name(SCHEMA_FILE).exists():  # editors warn if there is none
        text = f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}"
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already and is not overwritten; choose another path") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    say(f"wrote {path}; next: mlorq compress {path} --dry-run")
    return lambda: 0


@command
@click.option("--output", metavar="FILE", type=PATH, help=f"file to write, such as {SCHEMA_FILE}; default: print it")
def schema(arguments: Arguments) -> Finish:
    """Write or print the JSON schema of configurations."""
    from mlorq.config.schema import json_schema

    text = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    if arguments.output is None:
        return lambda: print_text(text)
    try:
        Path(arguments.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {arguments.output} cannot be written: {error.strerror}") from error
    say(f"wrote {arguments.output}; first line of a configuration: # yaml-language-server: $schema={arguments.output}")
    return lambda: 0


@command
@json_option
def models(arguments: Arguments) -> Finish:
    """List the tested models."""
    from mlorq.models import known_models

    rows = known_models()

    def finish() -> int:
        from flows.render import console, print_models

        if arguments.json:
            print_json({"models": rows})
        else:
            print_models(rows, console())
        return 0

    return finish
