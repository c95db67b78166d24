"""Linear layers whose inputs have the samples on their second axis.

Sequence-first code, ``(tokens, samples, features)``, is common: ``nn.MultiheadAttention`` without ``batch_first``,
decoders of detectors, encoders that transpose their input. Other code joins all samples to one sequence,
``(1, samples · tokens, features)``. Statistics are means over samples, so they have to know the axis. A pass on one
sample less shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch, Listed, batch_samples, take_samples

Shapes = dict[nn.Module, list[tuple[int, ...]]]
_AXES = 3  # of an input with tokens and samples


@contextmanager
def input_shapes(module: nn.Module) -> Iterator[Shapes]:
    """The shapes of the inputs of a module's linear layers, one for each call, while this is active."""
    shapes: Shapes = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        shape = tuple(values[0].shape) if values and isinstance(values[0], Tensor) else ()
        shapes.setdefault(layer, []).append(shape)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def mark_samples_axis(model: FloatModel, batch: Batch, shapes: Shapes) -> None:
    """Set ``samples_axis = 1`` on layers whose input has the samples on its second axis.

    Runs the model only if there is such a shape.

    Args:
        model: the float model.
        batch: a batch on its device.
        shapes: of the inputs of its layers on that batch (``input_shapes``).
    """
    samples = batch_samples(batch)
    if samples == 1 or isinstance(batch, Listed):
        return
    likely = {
        layer: found
        for layer, found in shapes.items()
        if all(len(shape) == _AXES and _may_be_second(shape, samples) for shape in found)
    }
    if not likely:
        return
    try:
        with torch.no_grad(), input_shapes(model.module) as fewer:
            model.outputs(model.module, take_samples(batch, slice(0, samples - 1)))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may insist on the size of its batches
        return
    for layer, found in likely.items():
        if fewer.get(layer) == [(first, second // samples * (samples - 1), width) for first, second, width in found]:
            layer.samples_axis = 1  # type: ignore[assignment]


def _may_be_second(shape: tuple[int, ...], samples: int) -> bool:
    return shape[1] == samples or (shape[0] == 1 and shape[1] % samples == 0)
