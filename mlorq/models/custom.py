"""The user's own modules: a factory ``package:function`` in a configuration, or an instance in Python."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mlorq.artifacts.locations import is_remote
from mlorq.config.run import ModelConfig
from mlorq.errors import DataError, ModelError
from mlorq.models import timm, transformers
from mlorq.models.base import FloatModel, Forward, attention_mask, call_module
from mlorq.models.transformers_detection import mark_samples


def load(config: ModelConfig, folder: str = "") -> FloatModel:
    """Call the factory: it returns an ``nn.Module``, or ``(module, forward)``.

    Raises:
        ModelError: the factory cannot be imported, fails, or returns something else.
    """
    assert config.factory is not None
    build = import_function(config.factory, folder, ModelError)
    try:
        with importable(folder):
            built = build(**config.arguments)
    except Exception as error:
        raise ModelError(f"model.factory {config.factory} failed: {describe_error(error)}") from error
    module, forward = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model.factory {config.factory} returned {type(module).__name__}, not an nn.Module or (module, forward)"
        )
    return from_module(module.to(getattr(torch, config.dtype)), forward)


def from_module(module: nn.Module, forward: Forward | None = None) -> FloatModel:
    """A module in memory as a float model; parameters stay where and what they are.

    Args:
        module: any ``nn.Module``.
        forward: ``forward(module, batch)`` gives the output tensor, samples first; default: call the module.
    """
    floating = [value for value in module.parameters() if value.is_floating_point()]
    if not floating:
        raise ModelError("the model has no floating parameters")
    mark_samples(module)
    kind = type(module)
    # Instances of the libraries' own models are described as such, so that their checkpoints load by themselves.
    architecture = timm.describe(module) or transformers.describe(module)
    if architecture is None:
        architecture = {"family": "custom", "class": f"{kind.__module__}.{kind.__qualname__}", "repr": str(module)}
    return FloatModel(
        module,
        architecture["family"],
        architecture,
        forward or call_module,
        attention_mask,
        dtype=floating[0].dtype,
    )


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
    function = getattr(module, attribute, None)
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
