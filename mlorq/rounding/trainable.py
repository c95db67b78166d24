"""Quantized layers whose codes, scales, factors and biases are trained (METHOD 7).

Codes become latent numbers in code units, rounded in every forward pass and trained as if they were not (straight
through); scales are trained as logarithms of their growth. What is computed from both stands in the module in the place
of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mlorq.codecs.affine import SMALLEST_SCALE, QuantizedMatrix
from mlorq.codecs.base import StoredMatrix
from mlorq.forms.base import FORMS
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.layers import Layer

HELD_OUT = 5  # one batch in so many is not trained on
CHECKS = 4  # looks at the held-out loss


class Matrix(Protocol):
    """One stored matrix with something to train.

    Attributes:
        latent: what its codes are computed from.
        growth: of its scales, as a logarithm; without effect where scales stay.
    """

    latent: nn.Parameter
    growth: nn.Parameter

    def values(self) -> Tensor:
        """Dequantized, differentiable."""

    def result(self) -> StoredMatrix:
        """What it is stored as."""


class _Affine:
    """Codes trained straight through their rounding, and scales."""

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


class _Frozen:
    """A matrix of a codec that has nothing to train here: its values stay."""

    def __init__(self, matrix: StoredMatrix, device: torch.device) -> None:
        self.stored = matrix
        self.dense = matrix.dequantize().to(device)
        self.latent = nn.Parameter(torch.zeros((), device=device))  # without effect, so that optimisers take it
        self.growth = nn.Parameter(torch.zeros((), device=device))

    def values(self) -> Tensor:
        return self.dense

    def result(self) -> StoredMatrix:
        return self.stored


def trainable_matrix(matrix: StoredMatrix, device: torch.device) -> Matrix:
    """A stored matrix with what can be trained of it."""
    return _Affine(matrix, device) if isinstance(matrix, QuantizedMatrix) else _Frozen(matrix, device)


class TrainableLayer:
    """A layer whose weight and bias are computed from what is trained, while ``attached``.

    Args:
        root: the model that holds it.
        layer: where it is. Modules that share its weight compute with what is trained too; their biases stay.
        compressed: what training starts from.
    """

    def __init__(self, root: nn.Module, layer: Layer, compressed: CompressedLayer) -> None:
        self.module = root.get_submodule(layer.name)
        self.modules = [self.module, *(root.get_submodule(name) for name in layer.aliases)]
        self.layer = compressed
        self.form = FORMS[compressed.candidate.form]
        weight = self.module._parameters["weight"]
        assert weight is not None
        self.shape, self.dtype = weight.shape, weight.dtype
        self.matrices: dict[str, Matrix] = {
            name: trainable_matrix(matrix, weight.device) for name, matrix in compressed.matrices.items()
        }
        bias = self.module._parameters.get("bias")
        own = bias is not None and not layer.aliases
        self.bias = nn.Parameter(bias.detach().float().clone()) if own and bias is not None else None

    def refresh(self) -> None:
        """Compute the weight anew; the graph reaches back to what is trained."""
        dense = self.form.combine({name: matrix.values() for name, matrix in self.matrices.items()})
        weight = dense.reshape(self.shape).to(self.dtype)
        for module in self.modules:
            module.weight = weight
        if self.bias is not None:
            self.module.bias = self.bias.to(self.dtype)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Plain tensors in the place of the modules' parameters, which come back at the end."""
        names = [(module, "weight") for module in self.modules]
        names += [(self.module, "bias")] if self.bias is not None else []
        kept = [(module, name, module._parameters.pop(name)) for module, name in names]
        try:
            yield
        finally:
            for module, name, parameter in kept:
                module.__dict__.pop(name, None)
                module._parameters[name] = parameter

    def result(self) -> CompressedLayer:
        matrices = {name: matrix.result() for name, matrix in self.matrices.items()}
        bias = self.layer.bias if self.bias is None else self.bias.detach().float().cpu().clone()
        return replace(self.layer, matrices=matrices, bias=bias)


def refresh_all(layers: Sequence[TrainableLayer]) -> None:
    """Compute all weights anew, with gradients whatever the caller does."""
    with torch.enable_grad():
        for layer in layers:
            layer.refresh()


@dataclass(frozen=True)
class Rates:
    """Step sizes: of codes in codes, of scales relative to them, of biases."""

    codes: float
    scales: float
    biases: float

    def groups(self, layers: Sequence[TrainableLayer]) -> list[dict[str, Any]]:
        """What an optimiser trains, each kind at its own rate."""
        matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
        groups: list[dict[str, Any]] = [
            {"params": [matrix.latent for matrix in matrices], "lr": self.codes},
            {"params": [matrix.growth for matrix in matrices], "lr": self.scales},
        ]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return groups + ([{"params": biases, "lr": self.biases}] if biases else [])


@dataclass(frozen=True)
class Trained:
    """What training came to.

    Attributes:
        layers: those given where nothing better was found.
        loss_before: on held-out samples.
        loss_after: the same with the layers returned; never above ``loss_before``.
        iterations: steps taken.
    """

    layers: list[CompressedLayer]
    loss_before: float
    loss_after: float
    iterations: int


Samples = TypeVar("Samples")


def train(
    layers: Sequence[TrainableLayer],
    batches: Sequence[Samples],
    objective: Callable[[Samples], Tensor],
    held_out_loss: Callable[[Sequence[Samples]], float],
    rates: Rates,
    iterations: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train layers with Adam, one batch a step, at rates that fall to zero; the best on held-out batches is returned.

    Args:
        layers: what is trained.
        batches: samples; every fifth batch is held out.
        objective: the loss of one batch, differentiable.
        held_out_loss: the loss of all held-out batches.
        rates: step sizes.
        iterations: steps.
        seed: of the batches' order.
        progress: called with (steps done, steps).
    """
    held, trained = batches[::HELD_OUT], [batch for index, batch in enumerate(batches) if index % HELD_OUT]
    trained = trained or list(batches)
    optimiser = torch.optim.Adam(rates.groups(layers))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)

    @torch.no_grad()
    def loss_held_out() -> float:
        refresh_all(layers)
        return held_out_loss(held)

    best = [layer.layer for layer in layers]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.attached())
        before = least = loss_held_out()
        for step, index in enumerate(_batch_order(len(trained), iterations, seed)):
            refresh_all(layers)
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad():
                objective(trained[index]).backward()
            optimiser.step()
            schedule.step()
            done = step + 1
            if progress is not None:
                progress(done, iterations)
            if done == iterations or done % max(1, iterations // CHECKS) == 0:
                loss = loss_held_out()
                if loss < least:
                    best, least = [layer.result() for layer in layers], loss
    return Trained(best, before, least, iterations)


def _batch_order(count: int, steps: int, seed: int) -> list[int]:
    """Which batch each step sees: every one once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]
