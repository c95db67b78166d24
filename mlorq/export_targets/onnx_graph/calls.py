"""How a model is called: names of the inputs, and the structure of the outputs, as JSON that travels with the file."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError

OUTPUT = "output"  # name of an output that is one tensor, and prefix of those in a sequence
LIBRARIES = ("transformers", "torchvision", "timm", "collections")  # whose output classes are made again


@dataclass(frozen=True)
class Call:
    """The inputs of a call by name.

    Attributes:
        names: names of the tensors, in order.
        by_keyword: whether the model takes them by keyword; else by position.
    """

    names: tuple[str, ...]
    by_keyword: bool

    @classmethod
    def of(cls, module: nn.Module, batch: Any) -> Call:
        """How ``batch`` is passed to ``module`` (``mlorq.models.base.call_module``).

        Raises:
            ModelError: the batch has entries that are not tensors.
        """
        if isinstance(batch, Mapping):
            names, values = tuple(batch), tuple(batch.values())
        else:
            values = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            taken = [name for name, one in inspect.signature(module.forward).parameters.items() if one.kind < 2]
            names = tuple(taken[: len(values)])
            if len(names) < len(values):
                names = tuple(f"input_{index}" for index in range(len(values)))
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, Tensor):
                raise ModelError(f"input {name!r} is {type(value).__name__}: an exported graph takes tensors only")
        return cls(names, isinstance(batch, Mapping))

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a call by name.

        Raises:
            ModelError: an input is missing or unknown.
        """
        found = dict(zip(self.names, args, strict=False)) | {key: value for key, value in kwargs.items()}
        missing, unknown = set(self.names) - set(found), set(found) - set(self.names)
        if missing or unknown or len(args) > len(self.names):
            wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(unknown)) or 'more'}"
            raise ModelError(f"the call {wrong}: the graph takes {', '.join(self.names)}")
        return found

    def run(self, module: nn.Module, values: Sequence[Tensor]) -> Any:
        """Call the module."""
        if self.by_keyword:
            return module(**dict(zip(self.names, values, strict=True)))
        return module(*values)

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "by_keyword": self.by_keyword}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Call:
        return cls(tuple(value["names"]), bool(value["by_keyword"]))


def described(output: Any, name: str = "") -> Any:
    """The structure of a model's output: a tensor's name, or an object or list of structures.

    Raises:
        ModelError: a part is not a tensor.
    """
    if isinstance(output, Tensor):
        return name or OUTPUT
    if isinstance(output, Mapping):
        entries = {str(key): described(value, f"{name}.{key}" if name else str(key)) for key, value in output.items()}
        return {"class": _class(output), "entries": entries}
    if isinstance(output, (tuple, list)):
        prefix = name or OUTPUT
        return {"class": _class(output), "items": [described(x, f"{prefix}_{i}") for i, x in enumerate(output)]}
    raise ModelError(f"the model returns {type(output).__name__}: an exported graph returns tensors only")


def flat(output: Any, structure: Any) -> dict[str, Tensor]:
    """The tensors of an output by the names of its structure."""
    if isinstance(structure, str):
        return {structure: output}
    found: dict[str, Tensor] = {}
    if "entries" in structure:
        for key, part in structure["entries"].items():
            found |= flat(output[key], part)
    else:
        for value, part in zip(output, structure["items"], strict=True):
            found |= flat(value, part)
    return found


def rebuilt(values: Mapping[str, Tensor], structure: Any) -> Any:
    """The inverse of ``flat``: an output of the class that the model returns, where its library is installed."""
    if isinstance(structure, str):
        return values[structure]
    kind = _found_class(structure["class"])
    if "entries" in structure:
        entries = {key: rebuilt(values, part) for key, part in structure["entries"].items()}
        return kind(**entries) if kind is not None else entries
    items = [rebuilt(values, part) for part in structure["items"]]
    if kind is not None and hasattr(kind, "_fields"):
        return kind(*items)
    return items if structure["class"] == "builtins:list" else tuple(items)


class Flat(nn.Module):
    """A module that takes and returns tensors by position, for exporters.

    Args:
        module: the model.
        call: its inputs.
        structure: the structure of its output.
        extras: further outputs computed from inputs and output, by name (``ModelFamily.derived_outputs``).
    """

    def __init__(self, module: nn.Module, call: Call, structure: Any, extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.training = module.training  # exporters put the whole module back into the mode of this wrapper
        self._call = call
        self._structure = structure
        self._extras = dict(extras)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """All outputs in the order of their names."""
        output = self._call.run(self.module, values)
        inputs = dict(zip(self._call.names, values, strict=True))
        further = [function(inputs, output) for function in self._extras.values()]
        # Exporters drop outputs that are the same tensor as another one or as an input.
        return tuple(torch.clone(value) for value in (*flat(output, self._structure).values(), *further))


def _class(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _found_class(name: str) -> Any:
    """A class of a known library; None for others, and if it is not installed."""
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] not in LIBRARIES:
        return None
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None
