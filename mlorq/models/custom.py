"""The user's own modules: a factory ``package:function`` in a configuration, or an instance in Python."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mlorq.artifacts.locations import is_remote
from mlorq.errors import DataError, ModelError
from mlorq.models.family import Example, ModelFamily
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.base import FloatModel


NAME = "custom"
IN_MEMORY = {"family": NAME, "factory": "given:in_memory"}  # the ``model`` section where a module is passed in


class CustomSettings(Settings):
    """The user's own code."""

    factory: str | None = Field(None, description="package:function that returns an nn.Module, or (module, forward)")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the constructor")

    def check(self) -> None:
        """Raise ValueError without a factory."""
        self.require_factory()

    def require_factory(self) -> str:
        """The factory.

        Raises:
            ValueError: there is none.
        """
        if not self.factory:
            raise ValueError(f"family {NAME} needs factory: package:function")
        return self.factory


class Custom(ModelFamily[CustomSettings]):
    """Any module; its checkpoints load into an instance of it."""

    name = NAME
    settings = CustomSettings
    rotates = True

    def load(self, settings: CustomSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """Call the factory: it returns an ``nn.Module``, or ``(module, forward)``.

        Raises:
            ModelError: the factory cannot be imported, fails, or returns something else.
        """
        import torch
        from torch import nn

        from mlorq.models.loading import from_module

        factory = settings.require_factory()
        build = import_function(factory, folder, ModelError)
        try:
            with importable(folder):
                built = build(**settings.arguments)
        except Exception as error:
            raise ModelError(f"model.factory {factory} failed: {describe_error(error)}") from error
        module, forward = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
        if not isinstance(module, nn.Module):
            raise ModelError(
                f"model.factory {factory} returned {type(module).__name__}, not an nn.Module or (module, forward)"
            )
        return from_module(module.to(getattr(torch, dtype)), forward)

    def display_name(self, settings: CustomSettings) -> str:
        """The last part of the factory's module."""
        return (settings.factory or "model").partition(":")[0].rpartition(".")[2]

    def example(self) -> Example:
        """Functions of the user's package."""

        def function(name: str) -> dict[str, Any]:
            return {"source": "custom", "factory": f"my_package:{name}"}

        return Example(
            {"factory": "my_package:build"},
            {"calibration": function("calibration_batches"), "evaluation": function("evaluate")},
            named="MODULE:FUNCTION",
            name_key="factory",
        )


def own_architecture(module: nn.Module) -> dict[str, Any]:
    """What is said of a module that no library knows: its class, and what it prints; it cannot be rebuilt."""
    kind = type(module)
    return {"family": NAME, "class": f"{kind.__module__}.{kind.__qualname__}", "repr": str(module)}


def import_function(location: str, folder: str, error_type: type[ModelError] | type[DataError]) -> Callable[..., Any]:
    """Import ``package:function``, looking in ``folder`` first.

    Raises:
        ModelError or DataError, as asked for: names what is missing.
    """
    module_name, separator, attribute = location.partition(":")
    if not separator or not module_name or not attribute:
        raise error_type(f"factory {location!r} is not of the form package:function")
    _forget_namesakes(module_name.partition(".")[0], _code_folder(folder))
    try:
        with importable(folder):
            importlib.invalidate_caches()
            module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise error_type(f"factory {location!r}: there is no module {module_name!r}") from error
        raise error_type(f"factory {location!r}: importing it failed: {describe_error(error)}") from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        raise error_type(f"factory {location!r}: {module_name} has no function {attribute!r}")
    return function


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """With ``folder`` first among the places that imports look in: functions may import when they are called."""
    place = _code_folder(folder)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have changed the path itself
            sys.path.remove(place)


def _code_folder(folder: str) -> str:
    """Code is imported from this machine alone: beside a configuration behind a URL it is in the working directory."""
    return "." if not folder or is_remote(folder) else folder


def _forget_namesakes(package: str, folder: str) -> None:
    """Drop an imported module when ``folder`` has another one of that name: else the wrong code would run."""
    known = sys.modules.get(package)
    candidates = [os.path.join(folder, f"{package}.py"), os.path.join(folder, package, "__init__.py")]
    here = [os.path.realpath(path) for path in candidates if os.path.isfile(path)]
    if known is not None and here and os.path.realpath(getattr(known, "__file__", None) or "") not in here:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


def describe_error(error: Exception) -> str:
    """An exception of the user's code in one line; its traceback stays with the cause."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
