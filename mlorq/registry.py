"""Registries of named implementations: forms, rounding methods, model families, data sources, quantizers, targets.

A configuration accepts the names in the registries, and all code looks implementations up there by name. Adding an
implementation therefore takes one file:

    class Double(Form): ...
    FORMS.register(Double())

An installed package adds its own through the entry point group ``mlorq.plugins``: its modules are imported at the first
lookup in a registry, in every process and container that runs steps.

Commands that answer at once (``mlorq init``, ``models``, ``schema``) import the files that fill the registries. These
files therefore import torch inside their functions, not at the top.
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

    Constraints on one field belong in its annotation (``Annotated[list[int], AfterValidator(...)]``), because sections
    are composed from the fields of several settings (``mlorq.config.compose``). Constraints across fields belong in
    ``check``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def check(self) -> None:
        """Check constraints across fields.

        Raises:
            ValueError: two values are inconsistent.
        """


class Named(Protocol):
    """An implementation that a registry can hold."""

    @property
    def name(self) -> str:
        """Its name in a configuration."""

    @property
    def settings(self) -> type[Settings]:
        """The class of the configuration keys that it reads."""


Item = TypeVar("Item", bound=Named)


class Registry(Generic[Item]):
    """Implementations by name, in the order of registration.

    Args:
        kind: the kind of implementation, for messages: ``rounding method``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.version = 0  # incremented at every change, to invalidate caches of derived classes
        self._items: dict[str, Item] = {}

    def register(self, item: Item) -> Item:
        """Add an implementation.

        Raises:
            ValueError: the name is already registered.
        """
        if item.name in self._items:
            raise ValueError(f"{self.kind} {item.name!r} is already registered: choose another name")
        self._items[item.name] = item
        self.version += 1
        return item

    @contextmanager
    def added(self, item: Item) -> Iterator[Item]:
        """Register an implementation for the duration of a ``with`` block."""
        self.register(item)
        try:
            yield item
        finally:
            del self._items[item.name]
            self.version += 1

    def __getitem__(self, name: str) -> Item:
        """The implementation with a name.

        Raises:
            ConfigError: the name is unknown; the message suggests the nearest one.
        """
        load_plugins()
        if name not in self._items:
            raise ConfigError(f"unknown {self.kind} {name!r}; {self.hint(name)}")
        return self._items[name]

    def hint(self, name: object) -> str:
        """A suggestion in place of an unknown name: the nearest name, or all of them."""
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
    """Import the modules of installed packages' entry points, once per process.

    Raises:
        ConfigError: a module cannot be imported; the message names the entry point.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True  # set first, because a plugin's import uses the registries
    for point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            raise ConfigError(f"plugin {point.name} ({point.value}) cannot be imported: {error!r}") from error
