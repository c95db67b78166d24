"""Training of the codes, scales, factors and biases of quantized layers (METHOD 7).

Codes are latent real numbers in units of codes, rounded in every forward pass and trained with the straight-through
estimator; scales are trained as logarithms of their growth. The dequantized weight replaces the module's parameter
during training.
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
from mlorq.models.layer_list import Layer

HELD_OUT = 5  # every fifth batch is held out
CHECKS = 4  # number of evaluations of the held-out loss during training


class Matrix(Protocol):
    """The trainable parameters of a stored matrix.

    Attributes:
        latent: parameter from which the codes are computed.
        growth: logarithm of the growth of the scales; unused if scales are fixed.
    """

    latent: nn.Parameter
    growth: nn.Parameter

    def values(self) -> Tensor:
        """Dequantized values, differentiable."""

    def result(self) -> StoredMatrix:
        """The matrix with its current codes and scales."""


class _Affine:
    """Codes, trained with the straight-through estimator, and scales."""

    def __init__(self, matrix: QuantizedMatrix, device: torch.device) -> None:
        self.stored = matrix
        self.zero = matrix.zero_point.float().to(device).unsqueeze(1)
        self.base = matrix.scale.float().to(device).unsqueeze(1)
        self.top = 2**matrix.bits - 1
        self.latent = nn.Parameter(matrix.codes.float().to(device))
        self.growth = nn.Parameter(torch.zeros_like(self.base))  # logarithm of scale / base

    def scale(self) -> Tensor:
        return self.base * self.growth.exp()

    def values(self) -> Tensor:
        """Dequantized values; gradients pass through rounding, and are 0 for clamped codes."""
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
    """A fixed matrix, of a codec that has no trainable parameters here."""

    def __init__(self, matrix: StoredMatrix, device: torch.device) -> None:
        self.stored = matrix
        self.dense = matrix.dequantize().to(device)
        self.latent = nn.Parameter(torch.zeros((), device=device))  # unused; optimisers need a parameter
        self.growth = nn.Parameter(torch.zeros((), device=device))

    def values(self) -> Tensor:
        return self.dense

    def result(self) -> StoredMatrix:
        return self.stored


def trainable_matrix(matrix: StoredMatrix, device: torch.device) -> Matrix:
    """The trainable parameters of a stored matrix, initialised from it."""
    return _Affine(matrix, device) if isinstance(matrix, QuantizedMatrix) else _Frozen(matrix, device)


class TrainableLayer:
    """A layer whose weight and bias are computed from trainable parameters while it is ``attached``.

    Args:
        root: the model that contains the layer.
        layer: the layer. Modules that share its weight use the trained weight too; with such modules, biases are fixed.
        compressed: the rounded layer from which training starts.
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
        """Recompute the weight and bias of the modules, differentiable by the trained parameters."""
        dense = self.form.combine({name: matrix.values() for name, matrix in self.matrices.items()})
        weight = dense.reshape(self.shape).to(self.dtype)
        for module in self.modules:
            module.weight = weight
        if self.bias is not None:
            self.module.bias = self.bias.to(self.dtype)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Remove the modules' parameters, for which ``refresh`` sets tensors, and restore them at the end."""
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
    """Recompute the weights of all layers, with gradients enabled."""
    with torch.enable_grad():
        for layer in layers:
            layer.refresh()


@dataclass(frozen=True)
class Rates:
    """Step sizes of codes (in units of codes), of scales (relative to their size) and of biases."""

    codes: float
    scales: float
    biases: float

    def groups(self, layers: Sequence[TrainableLayer]) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser, each kind with its step size."""
        matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
        groups: list[dict[str, Any]] = [
            {"params": [matrix.latent for matrix in matrices], "lr": self.codes},
            {"params": [matrix.growth for matrix in matrices], "lr": self.scales},
        ]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return groups + ([{"params": biases, "lr": self.biases}] if biases else [])


@dataclass(frozen=True)
class Trained:
    """Result of training.

    Attributes:
        layers: the best layers found; the given ones if training did not reduce the loss.
        loss_before: loss of the given layers on held-out samples.
        loss_after: loss of ``layers`` on held-out samples, at most ``loss_before``.
        iterations: number of steps.
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
    """Train layers with Adam and cosine-annealed step sizes, one batch per step.

    Args:
        layers: layers to train.
        batches: samples; every fifth batch is held out.
        objective: loss of one batch, differentiable.
        held_out_loss: loss of all held-out batches.
        rates: initial step sizes.
        iterations: number of steps.
        seed: of the order of batches.
        progress: called with (steps done, steps).

    Returns:
        The layers with the smallest held-out loss among the given ones and those at ``CHECKS`` evaluations.
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
    """Index of the batch of each step: random permutations of all batches, one after another."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]
