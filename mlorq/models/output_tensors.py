"""The tensor f(x) in what a model returns: the one whose errors the search weighs.

A model returns a tensor, ``logits``, a tuple whose first item counts, or several tensors in a list, a mapping or a
record: feature maps, hidden states of an encoder and a decoder. In the last case all floating-point tensors with
samples first are weighed, one after another in every sample's row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from mlorq.errors import ModelError


def output_tensor(output: Any, samples: int | None = None) -> Tensor:
    """f(x) in what a model returns.

    Args:
        output: a tensor; anything with ``logits``; a tuple that begins with a tensor; or any nesting of lists,
            tuples, mappings and dataclasses that holds tensors.
        samples: number of samples, for outputs with several tensors. None: the leading size of the first.

    Raises:
        ModelError: there is no floating-point tensor with an axis.
    """
    single = _single(output)
    if single is not None:
        return single
    parts = [value for _, value in _joined(output, samples)]
    if not parts:
        raise ModelError(
            f"the model returns {type(output).__name__} without a tensor of floating-point numbers with samples on its "
            "first axis: pass forward=callable(model, batch) -> Tensor"
        )
    if len(parts) == 1:
        return parts[0]
    return torch.cat([value.flatten(1).float() if value.dim() > 1 else value[:, None].float() for value in parts], 1)


def weighed_outputs(output: Any, samples: int | None = None) -> list[str]:
    """Names of the tensors that ``output_tensor`` takes out of an output of several; empty if the output is one."""
    return [] if _single(output) is not None else [name for name, _ in _joined(output, samples)]


def _single(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return output[0] if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else None


def _joined(output: Any, samples: int | None) -> list[tuple[str, Tensor]]:
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in _tensors(output):
        if value.is_floating_point() and value.dim():
            found.setdefault(id(value), (name, value))  # a tensor can have two names, as in ``hidden_states``
    values = list(found.values())
    rows = samples or (values[0][1].shape[0] if values else 0)
    # Without one tensor of a row per sample, the first decides what the message about rows says.
    return [one for one in values if one[1].shape[0] == rows] or values[:1]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    for key, item in items:
        yield from _tensors(item, f"{name}.{key}" if name else str(key))
