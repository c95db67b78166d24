"""Block reconstruction: the codes, scales, factors and biases of a block's layers, optimised together (METHOD 7).

The layers of a block start from their closed forms. Their codes are trained straight through the rounding, scales and
biases beside them at far smaller rates (``trainable``). The loss is the error of the block's output, on inputs of
the model whose earlier blocks are compressed already, against the float block's output in the float model (BRECQ, arXiv
2102.05426, without the sigmoid) or, with ``output``, the error of the model's output when the float rest of the model
follows.

``reconstruct_softly`` is what published methods do: soft rounding from nearest (``soft_rounding``) with scales and
biases as they are, and entries of the block's output weighted by squared gradients, or activations that stay float at
random.

Whatever is learned is kept only where it lowers the loss on samples that were not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlorq.activations.plan import quantizers_of
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.layers import Layer
from mlorq.rounding.base import Parts, Progress
from mlorq.rounding.block import ReconstructionSettings
from mlorq.rounding.brecq import SoftSettings
from mlorq.rounding.paired_forward import BlockCall, PairedForward
from mlorq.rounding.soft_rounding import Regulariser, SoftLayer, set_hard
from mlorq.rounding.trainable import Rates, TrainableLayer, Trained, refresh_all, train


def reconstruct(
    paired: PairedForward,
    block: int,
    layers: Sequence[tuple[Layer, CompressedLayer]],
    settings: ReconstructionSettings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """Optimise codes, scales, factors and biases of the layers of one block, straight through their rounding.

    Args:
        paired: the float model and its copy in which all layers up to this block's are compressed.
        block: index of the block.
        layers: of the block, as they are rounded.
        settings: steps and rates.
        seed: of the order of batches and all else that is drawn.
        progress: called with (steps done, steps).

    Returns:
        The layers; the copy in ``paired`` is as it was: set what is returned.
    """
    calls = paired.block_calls(block, outputs=settings.loss == "output", float_inputs=settings.drop > 0, seed=seed)
    objective = _Objective(paired, block)
    trainable = [TrainableLayer(paired.compressed, layer, compressed) for layer, compressed in layers]
    rates = Rates(settings.code_rate, settings.scale_rate, settings.bias_rate)
    step = _dropping(paired, block, objective, settings.drop, seed)
    return train(trainable, calls, step, _held_out(trainable, objective), rates, settings.iterations, seed, progress)


def reconstruct_softly(
    paired: PairedForward,
    block: int,
    layers: Sequence[tuple[Layer, CompressedLayer]],
    settings: SoftSettings,
    parts: Mapping[str, Parts],
    *,
    seed: int = 0,
    fisher: bool = False,
    drop: float = 0.0,
    progress: Progress | None = None,
) -> Trained:
    """Learn the rounding of a block's codes by rectified sigmoids; scales and biases stay.

    Args:
        paired, block, layers, settings, seed, progress: as for ``reconstruct``.
        parts: by layer: the float matrices that it stores, with their quantizers.
        fisher: weight entries of the block's output by squared gradients of the model's output (BRECQ).
        drop: share of activations that stay float in each step (QDrop).
    """
    calls = paired.block_calls(block, fisher=fisher, float_inputs=drop > 0, seed=seed)
    objective = _Objective(paired, block)
    soft = [SoftLayer(paired.compressed, layer, compressed, parts[layer.name]) for layer, compressed in layers]
    regulariser = Regulariser(soft, settings.iterations, settings.soft_weight)

    def regularised(call: BlockCall) -> Tensor:
        return objective(call) + regulariser()

    step = _dropping(paired, block, regularised, drop, seed)
    rates = Rates(settings.soft_rate, 0.0, 0.0)
    return train(soft, calls, step, _held_out(soft, objective), rates, settings.iterations, seed, progress)


def _held_out(trainable: Sequence[TrainableLayer], objective: _Objective) -> Callable[[Sequence[BlockCall]], float]:
    """The loss of held-out batches, with the codes that soft layers come to."""

    def loss(batches: Sequence[BlockCall]) -> float:
        set_hard(trainable, True)
        refresh_all(trainable)
        found = objective.of_all(batches)
        set_hard(trainable, False)
        return found

    return loss


def _dropping(
    paired: PairedForward, block: int, step: Callable[[BlockCall], Tensor], share: float, seed: int
) -> Callable[[BlockCall], Tensor]:
    """A step in which a share of the block's input comes from the float model, and of its activations stays float.

    QDrop, arXiv 2203.05740: what is learned then holds for more than one pattern of quantization errors.
    """
    if not share:
        return step
    generator = torch.Generator().manual_seed(seed)
    quantizers = quantizers_of(paired.block(block))

    def mixed(call: BlockCall) -> Tensor:
        for quantizer in quantizers:
            quantizer.drop, quantizer.generator = share, generator
        try:
            return step(_mixed_input(call, share, generator))
        finally:
            for quantizer in quantizers:
                quantizer.drop, quantizer.generator = 0.0, None

    return mixed


def _mixed_input(call: BlockCall, share: float, generator: torch.Generator) -> BlockCall:
    assert call.float_input is not None
    own = call.args[0] if call.args else next(iter(call.kwargs.values()))
    chosen = torch.rand(own.shape, generator=generator).to(own.device) < share
    value = torch.where(chosen, call.float_input, own)
    if call.args:
        return replace(call, args=(value, *call.args[1:]))
    return replace(call, kwargs={**call.kwargs, next(iter(call.kwargs)): value})


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
    """Squares of a block's output or its error, tokens or entries weighed."""
    if weights is None:
        return values.square()
    return values.square() * (weights if weights.dim() == values.dim() else weights.unsqueeze(-1))


def first_tensor(output: Any) -> Tensor:
    """A block's output, or the first of several."""
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result
