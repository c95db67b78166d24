"""Training of the codes, scales, factors and biases of quantized layers, of norms and ranges (METHOD 7, 8).

Codes are latent real numbers in units of codes, rounded in every forward pass and trained with the straight-through
estimator; scales are trained as logarithms of their growth (``StoredMatrix.trainable``). Parameters of normalisation
layers stay float. The dequantized weight and the changed parameters replace the modules' own during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mlorq.codecs.base import StoredMatrix, Trainable
from mlorq.forms.base import FORMS
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.kinds import known_kind
from mlorq.models.layer_list import Layer
from mlorq.models.norms import NormParameter
from mlorq.rounding.trainable_range import TrainableRange

HELD_OUT = 5  # every fifth batch is held out
CHECKS = 4  # number of evaluations of the held-out loss during training


class _Fixed:
    """A matrix whose codec has no trainable parameters."""

    latent = None
    growth = None

    def __init__(self, matrix: StoredMatrix, device: torch.device) -> None:
        self.stored = matrix
        self.dense = matrix.dequantize().to(device)

    def values(self) -> Tensor:
        return self.dense

    def result(self) -> StoredMatrix:
        return self.stored


def trainable_matrix(matrix: StoredMatrix, device: torch.device) -> Trainable:
    """The trainable parameters of a stored matrix, initialised from it; it stays fixed if its codec has none."""
    return matrix.trainable(device) or _Fixed(matrix, device)


@contextmanager
def _restored(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Restore parameters of modules at the end, for which tensors are set until then (``_set``)."""
    kept = [(module, name, module._parameters[name]) for module, name in places]
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, among ``parameters()``: models ask these for their dtype."""
    module._parameters[name] = value  # type: ignore[assignment]


class TrainableLayer:
    """A layer whose weight and bias are computed from trainable parameters while it is ``attached``.

    Args:
        root: the model that contains the layer.
        layer: the layer. Modules that share its weight use the trained weight too; with such modules, biases are fixed.
        compressed: the rounded layer from which training starts.
    """

    def __init__(self, root: nn.Module, layer: Layer, compressed: CompressedLayer) -> None:
        self.module = root.get_submodule(layer.name)
        named = [self.module, *(root.get_submodule(name) for name in layer.aliases)]
        self.modules = list({id(module): module for module in named}.values())  # a module can have two names
        self.layer = compressed
        self.form = FORMS[compressed.candidate.form]
        weight = self.module._parameters["weight"]
        assert weight is not None
        self.kind, self.shape, self.dtype = known_kind(self.module), weight.shape, weight.dtype
        self.matrices: dict[str, Trainable] = {
            name: trainable_matrix(matrix, weight.device) for name, matrix in compressed.matrices.items()
        }
        bias = self.module._parameters.get("bias")
        own = bias is not None and not layer.aliases
        self.bias = nn.Parameter(bias.detach().float().clone()) if own and bias is not None else None

    def refresh(self) -> None:
        """Recompute the weight and bias of the modules, differentiable by the trained parameters."""
        dense = self.form.combine({name: matrix.values() for name, matrix in self.matrices.items()})
        weight = self.kind.to_weight(dense, self.shape).to(self.dtype)
        for module in self.modules:
            _set(module, "weight", weight)
        if self.bias is not None:
            _set(self.module, "bias", self.bias.to(self.dtype))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Restore the modules' parameters at the end, for which ``refresh`` sets tensors."""
        places = [(module, "weight") for module in self.modules]
        places += [(self.module, "bias")] if self.bias is not None else []
        with _restored(places):
            yield

    def result(self) -> CompressedLayer:
        matrices = {name: matrix.result() for name, matrix in self.matrices.items()}
        bias = self.layer.bias if self.bias is None else self.bias.detach().float().cpu().clone()
        return replace(self.layer, matrices=matrices, bias=bias)


class TrainableNorm:
    """A parameter of a normalisation layer, trained in at least float32 and used in its own dtype.

    Args:
        parameter: the parameter in the model. All modules that hold it use the trained value while ``attached``.
    """

    def __init__(self, parameter: NormParameter) -> None:
        self.name, self.owners, self.unit = parameter.name, parameter.owners, parameter.unit
        self.given = parameter.tensor.detach().clone()
        self.base = self.given.to(torch.promote_types(self.given.dtype, torch.float32))
        self.change = nn.Parameter(torch.zeros_like(self.base))  # in units of the layer's scales

    def value(self) -> Tensor:
        """The current value in the parameter's dtype, differentiable."""
        return (self.base + self.unit * self.change).to(self.given.dtype)

    def refresh(self) -> None:
        """Set the current value in all modules that hold the parameter."""
        value = self.value()
        for module, key in self.owners:
            _set(module, key, value)

    def attached(self) -> AbstractContextManager[None]:
        """As for ``TrainableLayer``."""
        return _restored(self.owners)

    def result(self) -> Tensor:
        """The current value, on the CPU."""
        return self.value().detach().cpu()


Part = TrainableLayer | TrainableNorm | TrainableRange


def refresh_all(parts: Sequence[Part]) -> None:
    """Recompute all weights and parameters, with gradients enabled."""
    with torch.enable_grad():
        for part in parts:
            part.refresh()


@dataclass(frozen=True)
class Rates:
    """Initial step sizes.

    Attributes:
        codes: of codes, in units of codes.
        scales: of scales, relative to their size.
        biases: of biases.
        norms: of parameters of normalisation layers, relative to the size of the layer's scales.
        ranges: of the ranges of activations, relative to their size.
    """

    codes: float
    scales: float
    biases: float
    norms: float = 0.0
    ranges: float = 0.0

    def groups(
        self,
        layers: Sequence[TrainableLayer],
        norms: Sequence[TrainableNorm] = (),
        ranges: Sequence[TrainableRange] = (),
    ) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser, one per kind that has parameters, with its step size."""
        matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
        kinds: list[tuple[list[nn.Parameter | None], float]] = [
            ([matrix.latent for matrix in matrices], self.codes),
            ([matrix.growth for matrix in matrices], self.scales),
            ([layer.bias for layer in layers], self.biases),
            ([norm.change for norm in norms], self.norms),
            ([one.growth for one in ranges], self.ranges),
        ]
        found = [([one for one in parameters if one is not None], rate) for parameters, rate in kinds]
        return [{"params": parameters, "lr": rate} for parameters, rate in found if parameters]


@dataclass(frozen=True)
class Trained:
    """Result of training.

    Attributes:
        layers: the best layers found; the given ones if training did not reduce the loss.
        loss_before: loss of the given layers and norms on held-out samples.
        loss_after: loss of ``layers`` and ``rest`` on held-out samples, at most ``loss_before``.
        iterations: number of steps.
        rest: by name in the model: trained parameters that a checkpoint stores as float tensors, in their own dtype on
            the CPU. They belong to ``layers``: the given values if training did not reduce the loss.
    """

    layers: list[CompressedLayer]
    loss_before: float
    loss_after: float
    iterations: int
    rest: dict[str, Tensor] = field(default_factory=dict)


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
    norms: Sequence[TrainableNorm] = (),
    ranges: Sequence[TrainableRange] = (),
) -> Trained:
    """Train layers, norms and ranges with Adam and cosine-annealed step sizes, one batch per step.

    Args:
        layers: layers to train.
        batches: samples; every fifth batch is held out.
        objective: loss of one batch, differentiable.
        held_out_loss: loss of all held-out batches.
        rates: initial step sizes.
        iterations: number of steps.
        seed: of the order of batches.
        progress: called with (steps done, steps).
        norms: parameters of normalisation layers to train with the layers.
        ranges: ranges of activations to train with the layers.

    Returns:
        The layers, norms and ranges with the smallest held-out loss among the given ones and those at ``CHECKS``
        evaluations. Without any trainable parameter no step is made. A batch whose loss depends on none of them (a
        block that skips itself at random, an expert without tokens) changes nothing.
    """
    held, trained = batches[::HELD_OUT], [batch for index, batch in enumerate(batches) if index % HELD_OUT]
    trained = trained or list(batches)
    parts: list[Part] = [*layers, *norms, *ranges]
    groups = rates.groups(layers, norms, ranges)

    @torch.no_grad()
    def loss_held_out() -> float:
        refresh_all(parts)
        return held_out_loss(held)

    best = [layer.layer for layer in layers]
    rest: list[TrainableNorm | TrainableRange] = [*norms, *ranges]
    best_rest = {one.name: one.given.cpu() for one in rest}
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.attached())
        before = least = loss_held_out()
        if not groups:
            return Trained(best, before, before, 0, best_rest)
        optimiser = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
        for step, index in enumerate(_batch_order(len(trained), iterations, seed)):
            refresh_all(parts)
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = objective(trained[index])
            if loss.requires_grad:
                loss.backward()
            optimiser.step()
            schedule.step()
            done = step + 1
            if progress is not None:
                progress(done, iterations)
            if done == iterations or done % max(1, iterations // CHECKS) == 0:
                now = loss_held_out()
                if now < least:
                    best, least = [layer.result() for layer in layers], now
                    best_rest = {one.name: one.result() for one in rest}
    return Trained(best, before, least, iterations, best_rest)


def _batch_order(count: int, steps: int, seed: int) -> list[int]:
    """Index of the batch of each step: random permutations of all batches, one after another."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]
