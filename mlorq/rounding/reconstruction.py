"""Block reconstruction: joint optimisation of the codes, scales, factors and biases of a block's layers (METHOD 7).

``reconstruct`` starts from the closed forms of the layers and trains their codes with the straight-through estimator,
and scales, biases and the block's norms at far smaller step sizes (``trainable``). The block's input is that of the
model whose earlier blocks are compressed. With ``loss: block`` the loss is the error of the block's output against the
float block's output in the float model (BRECQ, arXiv 2102.05426, without the sigmoid); with ``loss: output`` it is the
error of the model's output when the float blocks follow.

``reconstruct_softly`` implements the published methods (METHOD 9): soft rounding that starts from nearest rounding
(``soft_rounding``), with fixed scales, biases and norms. BRECQ weights the entries of the block's output by squared
gradients; QDrop keeps activations float at random; later methods have losses of their own (``block_losses``) and train
the ranges of activations as well.

Both keep the trained layers and norms only if they reduce the loss on held-out samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlorq.activations.plan import quantizers_of
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.layer_list import Layer
from mlorq.models.norms import norm_parameters
from mlorq.rounding.base import Parts, Progress
from mlorq.rounding.block import ReconstructionSettings
from mlorq.rounding.block_losses import BlockLoss, first_tensor
from mlorq.rounding.brecq import SoftSettings
from mlorq.rounding.paired_forward import BlockCall, PairedForward
from mlorq.rounding.soft_rounding import Regulariser, SoftLayer, set_hard
from mlorq.rounding.trainable import Rates, TrainableLayer, TrainableNorm, Trained, refresh_all, train
from mlorq.rounding.trainable_range import trainable_ranges

LossOf = Callable[[PairedForward, int, Sequence[BlockCall]], BlockLoss]


def reconstruct(
    paired: PairedForward,
    block: int,
    layers: Sequence[tuple[Layer, CompressedLayer]],
    settings: ReconstructionSettings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    loss: LossOf | None = None,
) -> Trained:
    """Optimise codes, scales, factors, biases and norms of one block with the straight-through estimator.

    Args:
        paired: the float model and its copy in which all layers up to this block's are compressed.
        block: index of the block.
        layers: the rounded layers of the block.
        settings: number of steps, step sizes, loss and drop rate.
        seed: of the order of batches and all random numbers.
        progress: called with (steps done, steps).
        loss: makes a loss of the block; default: that of ``settings``.

    Returns:
        The optimised layers and norms; the copy in ``paired`` is unchanged: call ``paired.set`` for each layer and
        ``paired.set_rest``. Norms that modules outside the block share are fixed.

    Raises:
        ModelError: the loss is that of the model's output, and the model's blocks are not a chain.
    """
    whole = loss is not None or settings.loss == "output"
    calls = paired.block_calls(block, outputs=whole, even=loss is not None, float_inputs=settings.drop > 0, seed=seed)
    objective = _Objective(paired, block) if loss is None else loss(paired, block, calls)
    trainable = [TrainableLayer(paired.compressed, layer, compressed) for layer, compressed in layers]
    rates = Rates(settings.code_rate, settings.scale_rate, settings.bias_rate, settings.norm_rate, settings.range_rate)
    inside = norm_parameters(paired.compressed, paired.block_name(block)) if settings.norm_rate else []
    norms = [TrainableNorm(parameter) for parameter in inside]
    ranges = trainable_ranges(paired.compressed, paired.block_name(block)) if settings.range_rate else []
    step = _dropping(paired, block, objective, settings.drop, seed)
    held_out = _held_out(trainable, objective)
    return train(trainable, calls, step, held_out, rates, settings.iterations, seed, progress, norms, ranges)


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
    loss: LossOf | None = None,
    range_rate: float = 0.0,
) -> Trained:
    """Learn the rounding of a block's codes with rectified sigmoids; scales and biases are fixed (METHOD 9).

    Args:
        paired, block, layers, settings, seed, progress: as for ``reconstruct``.
        parts: by layer name: float matrices and quantizers of the matrices that it stores.
        fisher: whether to weight entries of the block's output by squared gradients of the model's output (BRECQ).
        drop: fraction of activations that stay float in each step (QDrop).
        loss: makes a loss of the block, instead of its squared error.
        range_rate: step size of the ranges of activations, relative to their size; 0: fixed.

    Returns:
        As for ``reconstruct``.

    Raises:
        ModelError: ``fisher`` or ``loss``, and the model's blocks are not a chain.
    """
    own = loss is not None
    calls = paired.block_calls(block, outputs=own, fisher=fisher, even=own, float_inputs=drop > 0, seed=seed)
    objective = _Objective(paired, block) if loss is None else loss(paired, block, calls)
    soft = [SoftLayer(paired.compressed, layer, compressed, parts[layer.name]) for layer, compressed in layers]
    regulariser = Regulariser(soft, settings.iterations, settings.soft_weight)

    def regularised(call: BlockCall) -> Tensor:
        return objective(call) + regulariser()

    step = _dropping(paired, block, regularised, drop, seed)
    rates = Rates(settings.soft_rate, 0.0, 0.0, ranges=range_rate)
    ranges = trainable_ranges(paired.compressed, paired.block_name(block)) if range_rate else []
    held_out = _held_out(soft, objective)
    return train(soft, calls, step, held_out, rates, settings.iterations, seed, progress, ranges=ranges)


def _held_out(trainable: Sequence[TrainableLayer], objective: Loss) -> Callable[[Sequence[BlockCall]], float]:
    """The loss of held-out batches with the final codes of soft layers."""

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
    """A loss of which random entries of the block's input come from the float model, and random activations stay float.

    QDrop, arXiv 2203.05740: training with random patterns of quantization errors generalises better.

    Args:
        paired, block, seed: as for ``reconstruct``.
        step: the loss of one batch.
        share: fraction of entries and activations that stay float; 0 returns ``step``.
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
    """Relative squared error of one batch."""

    def __init__(self, paired: PairedForward, block: int) -> None:
        self.paired = paired
        self.block = block
        self._powers: dict[int, float] = {}  # by the identity of the target, which outlives the objective

    def __call__(self, call: BlockCall) -> Tensor:
        return self._error(call) / self.power(call)

    def of_all(self, calls: Sequence[BlockCall]) -> float:
        """Relative squared error of many batches together."""
        return sum(float(self._error(call).double()) for call in calls) / sum(self.power(call) for call in calls)

    def _error(self, call: BlockCall) -> Tensor:
        output = self.paired.run_block(self.block, call)
        if call.outputs is not None:
            output = self.paired.finish(call, self.block + 1, output)
            return (output - call.outputs).square().sum()
        return weighted_square(first_tensor(output).float() - call.target, call.weights).sum()

    def power(self, call: BlockCall) -> float:
        """Weighted sum of squares of the target; computed once."""
        known = id(call.target)
        if known not in self._powers:
            self._powers[known] = self._power(call)
        return self._powers[known]

    @staticmethod
    def _power(call: BlockCall) -> float:
        aim = weighted_square(call.target, call.weights) if call.outputs is None else call.outputs.square()
        return max(float(aim.double().sum()), torch.finfo(torch.float32).tiny)


Loss = _Objective | BlockLoss


def weighted_square(values: Tensor, weights: Tensor | None) -> Tensor:
    """Squares of ``values``, weighted by token or by entry.

    Args:
        values: a block's output or its error, ``(samples, …, features)``.
        weights: of tokens, the shape of ``values`` without the last axis; of entries, its shape; None: equal weights.
    """
    if weights is None:
        return values.square()
    return values.square() * (weights if weights.dim() == values.dim() else weights.unsqueeze(-1))
