"""Block reconstruction: the codes, scales, factors and biases of a block's layers, optimised together (METHOD 7).

The layers of a block start from their closed forms. Their codes become latent numbers in code units, rounded in every
forward pass and trained as if they were not (straight through); scales and biases are trained beside them at far
smaller rates. The loss is the error of the block's output, on inputs of the model whose earlier blocks are compressed
already, against the float block's output in the float model (BRECQ, arXiv 2102.05426, without the sigmoid) or, with
``output``, the error of the model's output when the float rest of the model follows.

Whatever is learned is kept only where it lowers the loss on samples that were not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlorq.forms import CompressedLayer, combine
from mlorq.layers import Layer
from mlorq.paired import BlockCall, PairedForward
from mlorq.quantizers import SMALLEST_SCALE, QuantizedMatrix

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


class _Matrix:
    """One stored matrix with trainable codes and scales."""

    def __init__(self, matrix: QuantizedMatrix, device: torch.device) -> None:
        self.stored = matrix
        self.zero = matrix.zero_point.float().to(device).unsqueeze(1)
        self.base = matrix.scale.float().to(device).unsqueeze(1)
        self.top = 2**matrix.bits - 1
        self.latent = nn.Parameter(matrix.codes.float().to(device))
        self.growth = nn.Parameter(torch.zeros_like(self.base))  # of the scale, as a logarithm

    def scale(self) -> Tensor:
        return self.base * self.growth.exp()

    def values(self) -> Tensor:
        """Dequantized; gradients pass the rounding, and stop where a code is clamped."""
        inside = self.latent.clamp(0, self.top)
        codes = inside + (inside.round() - inside).detach()
        scale = self.scale()
        stored = scale.detach().to(torch.float16).float().clamp(min=SMALLEST_SCALE)
        return (codes - self.zero) * (scale + (stored - scale).detach())

    def result(self) -> QuantizedMatrix:
        codes = self.latent.detach().clamp(0, self.top).round().to(torch.uint8).cpu()
        scale = self.scale().detach().squeeze(1).to(torch.float16).clamp(min=SMALLEST_SCALE).cpu()
        return replace(self.stored, codes=codes, scale=scale)


class _TrainableLayer:
    """A layer whose weight and bias are computed from what is trained, while ``attached``."""

    def __init__(self, module: nn.Module, layer: CompressedLayer, may_change_bias: bool) -> None:
        self.module = module
        self.layer = layer
        weight = module._parameters["weight"]
        assert weight is not None
        self.shape, self.dtype = weight.shape, weight.dtype
        self.matrices = {name: _Matrix(matrix, weight.device) for name, matrix in layer.matrices.items()}
        bias = module._parameters.get("bias")
        self.bias = nn.Parameter(bias.detach().float().clone()) if may_change_bias and bias is not None else None

    def refresh(self) -> None:
        """Compute the weight anew; the graph reaches back to what is trained."""
        dense = combine({name: matrix.values() for name, matrix in self.matrices.items()})
        self.module.weight = dense.reshape(self.shape).to(self.dtype)
        if self.bias is not None:
            self.module.bias = self.bias.to(self.dtype)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Plain tensors in the place of the module's parameters, which come back at the end."""
        names = ["weight"] + (["bias"] if self.bias is not None else [])
        kept = {name: self.module._parameters.pop(name) for name in names}
        try:
            yield
        finally:
            for name, parameter in kept.items():
                self.module.__dict__.pop(name, None)
                self.module._parameters[name] = parameter

    def result(self) -> CompressedLayer:
        matrices = {name: matrix.result() for name, matrix in self.matrices.items()}
        bias = self.layer.bias if self.bias is None else self.bias.detach().float().cpu().clone()
        return replace(self.layer, matrices=matrices, bias=bias)


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
    trainable = [
        _TrainableLayer(paired.compressed.get_submodule(layer.name), compressed, not layer.aliases)
        for layer, compressed in layers
    ]
    optimiser = torch.optim.Adam(_groups(trainable, settings))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.iterations)
    order = _order(len(trained), settings.iterations, settings.seed)
    best = [compressed for _, compressed in layers]
    with _all_attached(trainable):
        before = least = _loss(trainable, objective, held)
        for step, index in enumerate(order):
            _refresh(trainable)
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
        difference = first_tensor(output).float() - call.target
        if call.mask is not None:
            difference = difference[call.mask]
        return difference.square().sum()

    def power(self, call: BlockCall) -> float:
        """Of what is aimed at."""
        aim = call.target if call.mask is None else call.target[call.mask]
        aim = aim if call.outputs is None else call.outputs
        return max(float(aim.double().square().sum()), torch.finfo(torch.float32).tiny)


def first_tensor(output: Any) -> Tensor:
    """A block's output, or the first of several."""
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result


@torch.no_grad()
def _loss(layers: Sequence[_TrainableLayer], objective: _Objective, calls: Sequence[BlockCall]) -> float:
    _refresh(layers)
    errors = sum(float(objective._error(call).double()) for call in calls)
    return errors / sum(objective.power(call) for call in calls)


def _refresh(layers: Sequence[_TrainableLayer]) -> None:
    with torch.enable_grad():
        for layer in layers:
            layer.refresh()


@contextmanager
def _all_attached(layers: Sequence[_TrainableLayer]) -> Iterator[None]:
    if not layers:
        yield
        return
    with layers[0].attached(), _all_attached(layers[1:]):
        yield


def _groups(layers: Sequence[_TrainableLayer], settings: ReconstructionSettings) -> list[dict[str, Any]]:
    matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
    groups: list[dict[str, Any]] = [
        {"params": [matrix.latent for matrix in matrices], "lr": settings.code_rate},
        {"params": [matrix.growth for matrix in matrices], "lr": settings.scale_rate},
    ]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return groups + ([{"params": biases, "lr": settings.bias_rate}] if biases else [])


def _order(count: int, steps: int, seed: int) -> list[int]:
    """Which batch each step sees: every one once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]
