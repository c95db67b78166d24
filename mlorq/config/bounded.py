"""Limits of configurations, whoever sends them: depth, numbers of values, lengths of texts and sizes of integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from mlorq.errors import ConfigError, one_line

MOST_CHARACTERS = 2**20  # of a file
MOST_VALUES = 100_000
MOST_ALIASES = 200
MOST_MERGED = 20_000  # entries of one mapping
DEEPEST = 32
LONGEST = 10_000  # characters of one text or number
LARGEST_BITS = 64


class _Loader(yaml.SafeLoader):
    """YAML as data, with a bounded number of aliases, which could otherwise expand without end."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MOST_ALIASES:
            raise yaml.YAMLError(f"it has more than {MOST_ALIASES} aliases")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.YAMLError(f"a mapping has more than {MOST_MERGED} entries")

    def construct_scalar(self, node: Any) -> Any:
        found = super().construct_scalar(node)
        if len(found) > LONGEST:
            raise yaml.YAMLError(f"a value has more than {LONGEST} characters")
        return found


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Args:
        text: the YAML.
        what: names it, for errors.

    Raises:
        ConfigError: it is not YAML, or beyond a limit.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{what} has more than {MOST_CHARACTERS} characters")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{what} is not YAML: {_described(error)}") from None


def _described(error: Exception) -> str:
    """Place and problem of a YAML error, without the piece of text: it may be a secret, cut beyond recognition."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return one_line(error)
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def check_values(values: Any) -> None:
    """Check the values of a configuration, before anything walks through them.

    Raises:
        ConfigError: they are nested too deeply, or there are too many, or a text or an integer is too large.
    """
    count, waiting = 0, [(values, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise ConfigError(f"the configuration has more than {MOST_VALUES} values")
        if depth > DEEPEST:
            raise ConfigError(f"the configuration is nested too deeply: more than {DEEPEST} levels")
        if isinstance(value, str) and len(value) > LONGEST:
            raise ConfigError(f"{value[:40]!r}…: a text of the configuration has more than {LONGEST} characters")
        if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
            raise ConfigError(f"an integer of the configuration has more than {LARGEST_BITS} bits")
        if isinstance(value, Mapping):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple)):
            waiting += [(part, depth + 1) for part in value]


def read_value(text: str, what: str) -> Any:
    """The value of a YAML text within all limits, such as one that a command line gives.

    Args:
        text: the YAML.
        what: names it, for errors.

    Raises:
        ConfigError: it is not YAML, or beyond a limit.
    """
    value = read_yaml(text, what)
    try:
        check_values(value)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    return value
