"""Outputs of a model for a data set, and the NMSE of a compressed model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import DataError
from mlorq.models.base import FloatModel, join_outputs
from mlorq.models.prefetch import feed


def model_outputs(
    model: FloatModel,
    module: nn.Module,
    batches: Sequence[Any],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """f(x) of all samples, ``(samples, outputs)`` float32 on the CPU.

    Args:
        model: the float model, which defines f(x) for a module.
        module: the float module or a compressed one, on ``device``.
        batches: inputs of the model.
        device: device of the computation.
        progress: called with (batches done, batches).
    """
    outputs = []
    with torch.no_grad():
        for index, batch in enumerate(feed(batches, device, model.dtype)):
            outputs.append(model.outputs(module, batch).cpu())
            if progress is not None:
                progress(index + 1, len(batches))
    return join_outputs(outputs)


def output_nmse(outputs: Tensor, reference: Tensor) -> float:
    """NMSE of the outputs, ``E‖f̂(x) - f(x)‖² / E‖f(x)‖²``, in float64 (METHOD 5).

    Args:
        outputs: of the compressed model, ``(samples, outputs)``.
        reference: of the float model, same shape.

    Raises:
        DataError: the shapes differ.
    """
    if outputs.shape != reference.shape:
        raise DataError(f"outputs have shape {tuple(outputs.shape)}, the reference {tuple(reference.shape)}")
    wanted = reference.double()
    power = float(wanted.square().sum())
    error = float((outputs.double() - wanted).square().sum())
    return error / power if power > 0 else float(error > 0)
