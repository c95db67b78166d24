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
from mlorq.trainable import Rates, TrainableLayer, Trained, train


@dataclass(frozen=True)
class ReconstructionSettings:
    """The fields mean what they mean in ``RoundingConfig``."""

    iterations: int = 300
    code_rate: float = 0.01
    scale_rate: float = 1e-3
    bias_rate: float = 1e-4
    loss: Literal["block", "output"] = "block"
    seed: int = 0


def reconstruct(
    paired: PairedForward,
    block: int,
    layers: Sequence[tuple[Layer, CompressedLayer]],
    settings: ReconstructionSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
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
    objective = _Objective(paired, block)
    trainable = [TrainableLayer(paired.compressed, layer, compressed) for layer, compressed in layers]
    rates = Rates(settings.code_rate, settings.scale_rate, settings.bias_rate)
    return train(trainable, calls, objective, objective.of_all, rates, settings.iterations, settings.seed, progress)


class _Objective:
    """Relative error of one batch of samples."""

    def __init__(self, paired: PairedForward, block: int) -> None:
        self.paired = paired
        self.block = block

    def __call__(self, call: BlockCall) -> Tensor:
        return self._error(call) / self.power(call)

    def of_all(self, calls: Sequence[BlockCall]) -> float:
        """Relative error of many batches together."""
        return sum(float(self._error(call).double()) for call in calls) / sum(self.power(call) for call in calls)

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
