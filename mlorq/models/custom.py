"""User-defined modules: a factory ``package:function`` in a configuration, or an instance in Python."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mlorq.artifacts.locations import is_remote
from mlorq.errors import DataError, ModelError, one_line
from mlorq.models.family import Example, ModelFamily
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.base import FloatModel


NAME = "custom"
OWN_PACKAGES = ("mlorq", "steps", "flows")
IN_MEMORY = {"family": NAME, "factory": "given:in_memory"}  # the ``model`` section if a module is passed in Python


class CustomSettings(Settings):
    """Settings of a user-defined model."""

    factory: str | None = Field(None, description="package:function that returns an nn.Module, or (module, forward)")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the constructor")

    def check(self) -> None:
        """Check that there is a factory.

        Raises:
            ValueError: ``factory`` is not set.
        """
        self.require_factory()

    def require_factory(self) -> str:
        """The factory.

        Raises:
            ValueError: ``factory`` is not set.
        """
        if not self.factory:
            raise ValueError(f"family {NAME} needs factory: package:function")
        return self.factory


class Custom(ModelFamily[CustomSettings]):
    """The family of user-defined modules; a checkpoint is loaded into an instance of the module."""

    name = NAME
    settings = CustomSettings
    rotates = True

    def load(self, settings: CustomSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """The model that the factory returns as an ``nn.Module``, or as ``(module, forward)``.

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
                f"model.factory {factory} returned {type(module).__name__}: return an nn.Module or (module, forward)"
            )
        return from_module(module.to(getattr(torch, dtype)), forward)

    def display_name(self, settings: CustomSettings) -> str:
        """The last component of the factory's module name."""
        return (settings.factory or "model").partition(":")[0].rpartition(".")[2]

    def example(self) -> Example:
        """Functions of a user's package."""

        def function(name: str) -> dict[str, Any]:
            return {"source": "custom", "factory": f"my_package:{name}"}

        return Example(
            {"factory": "my_package:build"},
            {"calibration": function("calibration_batches"), "evaluation": function("evaluate")},
            named="MODULE:FUNCTION",
            name_key="factory",
        )


def own_architecture(module: nn.Module) -> dict[str, Any]:
    """The architecture of a user-defined module: its class and its ``repr``; the module cannot be rebuilt from it."""
    kind = type(module)
    return {"family": NAME, "class": f"{kind.__module__}.{kind.__qualname__}", "repr": str(module)}


def import_function(location: str, folder: str, error_type: type[ModelError] | type[DataError]) -> Callable[..., Any]:
    """The function at ``package:function``.

    Args:
        location: ``package:function``.
        folder: searched before the import path.
        error_type: type of the errors raised.

    Raises:
        ModelError or DataError, as ``error_type`` says: the module cannot be imported or has no such function.
    """
    module_name, separator, attribute = location.partition(":")
    if not separator or not module_name or not attribute:
        raise error_type(f"factory {location!r} must have the form package:function")
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
    """Put ``folder`` first on the import path, also for imports inside functions that are called meanwhile."""
    path = _code_folder(folder)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have changed the import path
            sys.path.remove(path)


def _code_folder(folder: str) -> str:
    """The folder that code is imported from: ``folder``, or the working directory if it is empty or remote."""
    return "." if not folder or is_remote(folder) else folder


def _forget_namesakes(package: str, folder: str) -> None:
    """Remove an imported package from ``sys.modules`` if ``folder`` has another one of that name."""
    known = sys.modules.get(package)
    candidates = [os.path.join(folder, f"{package}.py"), os.path.join(folder, package, "__init__.py")]
    here = [os.path.realpath(path) for path in candidates if os.path.isfile(path)]
    if known is not None and here and os.path.realpath(getattr(known, "__file__", None) or "") not in here:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


def describe_error(error: Exception) -> str:
    """Type and message of an exception of the user's code and where it was raised, in one line."""
    place = _user_line(error)
    return f"{type(error).__name__}: {one_line(error)}" + (f" ({place})" if place else "")


def _user_line(error: Exception) -> str:
    """File and line of the innermost frame that is the user's: of no installed package; empty if there is none."""
    installed = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in OWN_PACKAGES and os.path.isfile(file) and not file.startswith(installed):
            found = f"{os.path.basename(file)}, line {line}"
    return found
