"""Named implementations of one kind: forms, rounding methods, model families, data sources, quantizers, targets.

A configuration offers what the registries hold, and everything that needs an implementation asks its registry for it by
name, so that adding one is one file:

    class Double(Form): ...
    FORMS.register(Double())

An installed package joins in through the entry point group ``mlorq.plugins``: its modules are imported the first time a
registry is asked, in every process and container that runs steps.

The files that registries are filled from are read for every command, ``mlorq --help`` included: they import torch where
they compute, not at their top.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from mlorq.errors import ConfigError

PLUGINS = "mlorq.plugins"  # entry point group


class Settings(BaseModel):
    """Part of a configuration: frozen, and unknown keys are errors.

    A field says by its annotation what it may be (``Annotated[list[int], AfterValidator(...)]``), because sections are
    composed from the fields of several settings (``mlorq.config.compose``). ``check`` is for what concerns several.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def check(self) -> None:
        """Raise ValueError where values do not fit together."""


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str:
        """As a configuration writes it."""

    @property
    def settings(self) -> type[Settings]:
        """The configuration keys that it reads."""


Item = TypeVar("Item", bound=Named)


class Registry(Generic[Item]):
    """Implementations by name, in the order in which they were registered.

    Args:
        kind: what they are, for messages: ``rounding method``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.version = 0  # rises with every change, for what is derived from the content
        self._items: dict[str, Item] = {}

    def register(self, item: Item) -> Item:
        """Add an implementation.

        Raises:
            ValueError: the name is taken.
        """
        if item.name in self._items:
            raise ValueError(f"{self.kind} {item.name!r} is registered already")
        self._items[item.name] = item
        self.version += 1
        return item

    @contextmanager
    def added(self, item: Item) -> Iterator[Item]:
        """An implementation that is there for the time of a ``with`` block."""
        self.register(item)
        try:
            yield item
        finally:
            del self._items[item.name]
            self.version += 1

    def __getitem__(self, name: str) -> Item:
        """The implementation of a name.

        Raises:
            ConfigError: there is none; the nearest name is given.
        """
        load_plugins()
        if name not in self._items:
            raise ConfigError(f"unknown {self.kind} {name!r}; {self.hint(name)}")
        return self._items[name]

    def hint(self, name: object) -> str:
        """What to write instead of an unknown name."""
        near = difflib.get_close_matches(str(name), self._items, n=1, cutoff=0.5)
        return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self._items)}"

    def __contains__(self, name: object) -> bool:
        load_plugins()
        return name in self._items

    def __iter__(self) -> Iterator[Item]:
        load_plugins()
        return iter(list(self._items.values()))

    def names(self) -> list[str]:
        """All names."""
        return [item.name for item in self]


_plugins_loaded = False


def load_plugins() -> None:
    """Import the modules of installed packages' entry points, once a process.

    Raises:
        ConfigError: a module cannot be imported; the entry point is named.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True  # first: a plugin's own import asks the registries
    for point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            raise ConfigError(f"plugin {point.name} ({point.value}) cannot be imported: {error!r}") from error
