"""Tuning of the whole compressed model against the float one, after its layers and blocks (METHOD 7).

Layers are rounded and blocks reconstructed front to back: an early one cannot know what later ones make of its error.
Here the codes, scales, factors and biases of all layers are trained together, straight through the rounding, to give
the float model's output and the outputs of its blocks, since there are few samples and their outputs alone tell little
about others. No labels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.capture import counting
from mlorq.forms import CompressedLayer
from mlorq.importance import Importance
from mlorq.layers import Layer
from mlorq.models.base import FloatModel, move_batch
from mlorq.paired import token_weights
from mlorq.reconstruct import CHECKS, HELD_OUT, ReconstructionResult, first_tensor, weighted_square
from mlorq.trainable import TrainableLayer, all_attached, batch_order, parameter_groups, refresh_all


@dataclass(frozen=True)
class TuningSettings:
    """The fields mean what they mean in ``RoundingConfig``."""

    tuning: int = 150
    tuning_rate: float = 0.005
    scale_rate: float = 1e-3
    bias_rate: float = 1e-4
    seed: int = 0


def tune(
    model: FloatModel,
    blocks: Sequence[str],
    layers: Sequence[tuple[Layer, CompressedLayer]],
    batches: Sequence[Any],
    settings: TuningSettings,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    *,
    importance: Sequence[Importance] | None = None,
) -> ReconstructionResult:
    """Train all compressed layers of a model together.

    Args:
        model: the float model, left as it is.
        blocks: names of its blocks.
        layers: all compressed layers, as they are rounded.
        batches: calibration samples, a batch a step; every fifth is held out.
        settings: steps and rates.
        device: where to run.
        progress: called with (steps done, steps).
        importance: weights of the tokens of the blocks' outputs, a mapping a batch; None: all weigh the same.

    Returns:
        The layers; those given where the loss on held-out batches did not fall.
    """
    module = deepcopy(model.module)
    trainable = []
    for layer, compressed in layers:
        bias = module.get_submodule(layer.name).bias
        if compressed.bias is not None and isinstance(bias, Tensor):
            bias.detach().copy_(compressed.bias)
        trainable.append(TrainableLayer(module, layer, compressed))
    weights: Sequence[Importance] = importance or [{}] * len(batches)
    moved = [(move_batch(batch, device, model.dtype), own) for batch, own in zip(batches, weights, strict=True)]
    held, trained = moved[::HELD_OUT], [batch for index, batch in enumerate(moved) if index % HELD_OUT]
    trained = trained or moved
    objective = _Objective(model, module, blocks)
    groups = parameter_groups(trainable, settings.tuning_rate, settings.scale_rate, settings.bias_rate)
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.tuning)
    best = [compressed for _, compressed in layers]
    with all_attached(trainable):
        before = least = _held_out_loss(trainable, objective, held)
        for step, index in enumerate(batch_order(len(trained), settings.tuning, settings.seed)):
            refresh_all(trainable)
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad():
                objective(*trained[index]).backward()
            optimiser.step()
            schedule.step()
            done = step + 1
            if progress is not None:
                progress(done, settings.tuning)
            if done == settings.tuning or done % max(1, settings.tuning // CHECKS) == 0:
                loss = _held_out_loss(trainable, objective, held)
                if loss < least:
                    best, least = [layer.result() for layer in trainable], loss
    return ReconstructionResult(best, before, least, settings.tuning)


class _Objective:
    """NMSE of the output, and the mean relative error of the blocks' outputs, of one batch."""

    def __init__(self, model: FloatModel, module: nn.Module, blocks: Sequence[str]) -> None:
        self.model = model
        self.module = module
        self.blocks = list(blocks)

    def __call__(self, batch: Any, importance: Importance) -> Tensor:
        with torch.no_grad(), _outputs_of(self.model.module, self.blocks) as wanted:
            reference = self.model.outputs(self.model.module, batch)
        with _outputs_of(self.module, self.blocks) as found:
            output = self.model.outputs(self.module, batch)
        loss = _relative(output - reference, reference, None)
        mask = self.model.token_mask(batch)
        errors = []
        for name, target in wanted.items():
            weights = token_weights(target, counting(mask, target), importance.get(name))
            errors.append(_relative(found[name] - target, target, weights))
        return loss + sum(errors, torch.zeros_like(loss)) / max(1, len(errors))


def _relative(error: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    power = weighted_square(wanted, weights).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return weighted_square(error, weights).sum() / power


@contextmanager
def _outputs_of(module: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the blocks return in one forward pass, float32; of each its last call."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = first_tensor(output).float()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _held_out_loss(
    layers: Sequence[TrainableLayer], objective: _Objective, batches: Sequence[tuple[Any, Importance]]
) -> float:
    refresh_all(layers)
    return sum(float(objective(*batch)) for batch in batches) / len(batches)
