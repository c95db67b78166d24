"""Block reconstruction: the codes, scales, factors and biases of a block's layers, optimised together (METHOD 7).

The layers of a block start from their closed forms. Their codes are trained straight through the rounding, scales and
biases beside them at far smaller rates (``mlorq.trainable``). The loss is the error of the block's output, on inputs of
the model whose earlier blocks are compressed already, against the float block's output in the float model (BRECQ, arXiv
2102.05426, without the sigmoid) or, with ``output``, the error of the model's output when the float rest of the model
follows.

Whatever is learned is kept only where it lowers the loss on samples that were not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mlorq.forms import CompressedLayer
from mlorq.layers import Layer
from mlorq.paired import BlockCall, PairedForward
from mlorq.trainable import TrainableLayer, all_attached, batch_order, parameter_groups, refresh_all

HELD_OUT = 5  # one sample batch in so many is not trained on
CHECKS = 4  # looks at the held-out loss


@dataclass(frozen=True)
class ReconstructionSettings:
    """The fields mean what they mean in ``RoundingConfig``."""

    iterations: int = 300
    code_rate: float = 0.01
    scale_rate: float = 1e-3
    bias_rate: float = 1e-4
    loss: Literal["block", "output"] = "block"
    seed: int = 0


@dataclass(frozen=True)
class ReconstructionResult:
    """A reconstructed block.

    Attributes:
        layers: its layers; those given where nothing better was found.
        loss_before: on held-out samples, relative to the power of the target.
        loss_after: the same with the layers returned; never above ``loss_before``.
        iterations: steps taken.
    """

    layers: list[CompressedLayer]
    loss_before: float
    loss_after: float
    iterations: int


def reconstruct(
    paired: PairedForward,
    block: int,
    layers: Sequence[tuple[Layer, CompressedLayer]],
    settings: ReconstructionSettings,
    progress: Callable[[int, int], None] | None = None,
) -> ReconstructionResult:
    """Optimise the layers of one block.

    Args:
        paired: the float model and its copy in which all layers up to this block's are compressed.
        block: index of the block.
        layers: of the block, as they are rounded.
        settings: steps and rates.
        progress: called with (steps done, steps).

    Returns:
        The layers; the copy in ``paired`` is as it was: set what is returned.
    """
    calls = paired.block_calls(block, outputs=settings.loss == "output")
    held, trained = calls[::HELD_OUT], [call for index, call in enumerate(calls) if index % HELD_OUT]
    trained = trained or calls
    objective = _Objective(paired, block)
    trainable = [TrainableLayer(paired.compressed, layer, compressed) for layer, compressed in layers]
    optimiser = torch.optim.Adam(
        parameter_groups(trainable, settings.code_rate, settings.scale_rate, settings.bias_rate)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.iterations)
    order = batch_order(len(trained), settings.iterations, settings.seed)
    best = [compressed for _, compressed in layers]
    with all_attached(trainable):
        before = least = _loss(trainable, objective, held)
        for step, index in enumerate(order):
            refresh_all(trainable)
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad():
                objective(trained[index]).backward()
            optimiser.step()
            schedule.step()
            done = step + 1
            if progress is not None:
                progress(done, settings.iterations)
            if done == settings.iterations or done % max(1, settings.iterations // CHECKS) == 0:
                loss = _loss(trainable, objective, held)
                if loss < least:
                    best, least = [layer.result() for layer in trainable], loss
    return ReconstructionResult(best, before, least, settings.iterations)


class _Objective:
    """Relative error of one batch of samples."""

    def __init__(self, paired: PairedForward, block: int) -> None:
        self.paired = paired
        self.block = block

    def __call__(self, call: BlockCall) -> Tensor:
        return self._error(call) / self.power(call)

    def _error(self, call: BlockCall) -> Tensor:
        output = self.paired.run_block(self.block, call)
        if call.outputs is not None:
            output = self.paired.finish(call, self.block + 1, output)
            return (output - call.outputs).square().sum()
        return weighted_square(first_tensor(output).float() - call.target, call.weights).sum()

    def power(self, call: BlockCall) -> float:
        """Of what is aimed at."""
        aim = weighted_square(call.target, call.weights) if call.outputs is None else call.outputs.square()
        return max(float(aim.double().sum()), torch.finfo(torch.float32).tiny)


def weighted_square(values: Tensor, weights: Tensor | None) -> Tensor:
    """Squares of a block's output or its error, tokens weighed."""
    return values.square() if weights is None else values.square() * weights.unsqueeze(-1)


def first_tensor(output: Any) -> Tensor:
    """A block's output, or the first of several."""
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result


@torch.no_grad()
def _loss(layers: Sequence[TrainableLayer], objective: _Objective, calls: Sequence[BlockCall]) -> float:
    refresh_all(layers)
    errors = sum(float(objective._error(call).double()) for call in calls)
    return errors / sum(objective.power(call) for call in calls)
