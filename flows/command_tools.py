"""Functions that several commands share."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from mlorq.artifacts.locations import resolve_location, url_of_store
from mlorq.config.bounded import read_value
from mlorq.errors import CheckpointError, ConfigError, StoreError, hide_secrets

if TYPE_CHECKING:
    from flows.options import Arguments
    from mlorq.artifacts.store import Store
    from mlorq.config.run import RunConfig


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_text(text: str) -> int:
    """Print a text on standard output; returns the exit status 0."""
    print(text, end="")
    return 0


def read_arguments(arguments: Arguments) -> RunConfig:
    """The configuration that a command names, with the overrides of ``--set``.

    Raises:
        ConfigError: the file or a value is wrong.
    """
    from mlorq.config.run import RunConfig

    return RunConfig.from_yaml(arguments.config, overrides_of(arguments))


def overrides_of(arguments: Arguments) -> dict[str, Any]:
    """The overrides of ``--set`` by key.

    Raises:
        ConfigError: a value is not YAML, or beyond a limit.
    """
    return {key: read_value(text, f"--set {key}={shown(text)}: the value") for key, text in arguments.set}


def shown(text: str) -> str:
    """A value of the command line, for messages: one line, cut, and without secrets."""
    line = hide_secrets(" ".join(text.split()))
    return line if len(line) <= 60 else f"{line[:60]}…"


def check_output(location: str) -> None:
    """Raise before a long run if an output folder is not writable.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from mlorq.artifacts.store import Store

    try:
        Store(resolve_location(location, os.getcwd())).check_writable()
    except StoreError as error:
        raise CheckpointError(f"--output {location} cannot be written: {error.__cause__ or error}") from error


def named_store(arguments: Arguments) -> Store:
    """The store that a command names by a configuration or by ``--store``, without a cache.

    Raises:
        ConfigError: neither or both are given.
        StoreError: the URL's protocol is unknown.
    """
    from mlorq.artifacts.store import Store
    from mlorq.config.run import RunConfig

    if (arguments.config is None) == (arguments.store is None):
        raise ConfigError(f"{arguments.command}: name the store with either a configuration or --store URL")
    if arguments.store is not None:
        return Store(resolve_location(url_of_store(arguments.store), os.getcwd()))
    config = RunConfig.from_yaml(arguments.config)
    return Store(config.resolve(config.store))
