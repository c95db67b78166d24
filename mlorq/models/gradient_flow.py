"""Layers that affect the model's output without a gradient: behind ``no_grad``, ``detach``, rounding and the like.

The search weighs the errors of a layer by gradients of the output. Without a gradient every error seems to cost
nothing, which is true only of a layer whose output the model does not use. A change of the layer's output tells the two
apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError, one_line
from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch
from mlorq.models.observe import outputs_changed

UNCHANGED = 1e-6  # largest difference of the outputs, relative to their norm


def without_gradient(model: FloatModel, layers: Mapping[str, Sequence[nn.Module]], batch: Batch) -> list[str]:
    """Names of the layers that affect the outputs of a batch although no gradient of these reaches them.

    Args:
        model: the float model.
        layers: the modules of each layer: several if they share a weight.
        batch: a batch on the model's device.

    Raises:
        ModelError: the gradient cannot be computed.
    """
    reached = _reached(model, layers, batch)
    without = [name for name in layers if name not in reached]
    with torch.no_grad():
        wanted = model.outputs(model.module, batch)

    def affect(names: Sequence[str]) -> bool:
        generator = torch.Generator().manual_seed(0)

        def noisy(output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output)
            return output + noise * output.detach().abs().mean().clamp(min=1e-3)

        with torch.no_grad(), outputs_changed([child for name in names for child in layers[name]], noisy):
            found = model.outputs(model.module, batch)
        return found.shape != wanted.shape or bool((found - wanted).norm() > UNCHANGED * wanted.norm())

    if not without or not affect(without):
        return []
    return [name for name in without if affect([name])]


def _reached(model: FloatModel, layers: Mapping[str, Sequence[nn.Module]], batch: Batch) -> set[str]:
    """Names of the layers whose outputs have a gradient other than zero."""
    calls: list[tuple[str, Tensor]] = []

    def hook(name: str, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        calls.append((name, output))
        return output.clone()  # an in-place activation must not overwrite the tensor that is differentiated

    handles = [
        child.register_forward_hook(lambda _, __, output, name=name: hook(name, output))
        for name, children in layers.items()
        for child in children
    ]
    try:
        with torch.enable_grad():
            outputs = model.outputs(model.module, batch)
            if not outputs.requires_grad:
                return set()
            vector = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
            gradients = torch.autograd.grad(outputs, [value for _, value in calls], vector, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(f"the gradient of the model's output cannot be computed: {one_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(calls, gradients, strict=True)
    return {name for (name, _), gradient in pairs if gradient is not None and bool((gradient != 0).any())}
