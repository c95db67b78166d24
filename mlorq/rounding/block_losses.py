"""Losses of block reconstruction of published methods (METHOD 9), for z the output of a block.

- ``PerturbationLoss`` (APHQ-ViT, arXiv 2504.02508): squared errors of z, weighted by entry.
- ``LowRankLoss`` (FIMA-Q, arXiv 2506.11543): a quadratic form of the error, diagonal plus low rank, whose rank grows
  during training.
- ``LeastSquaresLoss`` (LS-ViT, CVPR 2026): a diagonal and a rank-one form, fitted by least squares.
- ``FeatureLoss`` (GLF-Q): the error of the input of the model's head, plus that of z.

The first three approximate the effect of an error of z on ``calibration.output_divergence``. Blocks after this one are
float. The forms belong to single entries of z, the same for all samples; z of other shapes (sequences of other
lengths) have forms of their own. Padding does not count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.calibration.output_divergence import divergence, divergence_gradient, perturbation_hessian
from mlorq.rounding.paired_forward import BlockCall, PairedForward

TINY = torch.finfo(torch.float32).tiny
Shape = tuple[int, ...]


def first_tensor(output: Any) -> Tensor:
    """A block's output, or its first one if there are several."""
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result


class BlockLoss(ABC):
    """The loss of one block.

    Args:
        paired: the float model and its copy in which all layers up to this block's are compressed.
        block: index of the block.
        calls: all batches at its input, with the model's outputs and with no weights but masks.
    """

    def __init__(self, paired: PairedForward, block: int, calls: Sequence[BlockCall]) -> None:
        self.paired, self.block, self.calls = paired, block, calls

    @abstractmethod
    def __call__(self, call: BlockCall) -> Tensor:
        """The loss of one batch, differentiable."""

    def of_all(self, calls: Sequence[BlockCall]) -> float:
        """The mean loss of many batches."""
        return sum(float(self(call)) for call in calls) / max(1, len(calls))

    def output(self, call: BlockCall) -> Any:
        """What the compressed block returns."""
        return self.paired.run_block(self.block, call)

    def finished(self, call: BlockCall, output: Any, first: Tensor) -> Tensor:
        """f(x) of the float model continued from a block's output, with ``first`` in place of its first tensor."""
        return self.paired.finish(call, self.block + 1, with_first(output, first))

    def gradient(self, call: BlockCall, output: Any) -> Tensor:
        """``∂D/∂z`` at a block's output."""
        assert call.outputs is not None
        return divergence_gradient(first_tensor(output), lambda z: self.finished(call, output, z), call.outputs)


def with_first(output: Any, first: Tensor) -> Any:
    """A block's output with another first tensor."""
    return first if isinstance(output, Tensor) else (first, *output[1:])


def masked(values: Tensor, call: BlockCall) -> Tensor:
    """``values`` of the shape of z, zero at padding."""
    return values if call.weights is None else values * call.weights.unsqueeze(-1)


def error(call: BlockCall, output: Any) -> Tensor:
    """``Δz``, zero at padding, differentiable."""
    return masked(first_tensor(output).float() - call.target, call)


class PerturbationLoss(BlockLoss):
    """``Σ h_i Δz_i² / Σ h_i z_i²`` with h the mean over samples of ``perturbation_hessian`` (APHQ-ViT)."""

    def __init__(self, paired: PairedForward, block: int, calls: Sequence[BlockCall]) -> None:
        super().__init__(paired, block, calls)
        sums: dict[Shape, Tensor] = {}
        counts: dict[Shape, int] = {}
        for call, output in zip(calls, paired.float_outputs(block), strict=True):
            found = masked(self._hessian(call, output), call)
            shape = tuple(found.shape[1:])
            sums[shape] = sums.get(shape, torch.zeros_like(found[0])) + found.sum(0)
            counts[shape] = counts.get(shape, 0) + len(found)
        means = {shape: value / counts[shape] for shape, value in sums.items()}
        level = sum(float(value.double().sum()) for value in means.values()) / sum(map(torch.numel, means.values()))
        self.weights = {shape: value / max(level, TINY) for shape, value in means.items()}  # of mean 1

    def _hessian(self, call: BlockCall, output: Any) -> Tensor:
        assert call.outputs is not None
        return perturbation_hessian(first_tensor(output), lambda z: self.finished(call, output, z), call.outputs)

    def __call__(self, call: BlockCall) -> Tensor:
        delta = error(call, self.output(call))
        weights = self.weights[tuple(delta.shape[1:])]
        power = (weights * masked(call.target, call).square()).sum().clamp(min=TINY)
        return (weights * delta.square()).sum() / power


class LowRankLoss(BlockLoss):
    """``|Δz|ᵀ Gᵀ (D Dᵀ)⁻¹ G |Δz| + Σ_i ḡ_i Δz_i²``, each term relative to its first value (FIMA-Q).

    The rows of G are means over samples of ``|∂D/∂z|`` and those of D of ``|Δz|``, taken of the model at equal
    intervals of training; ḡ is the mean of the rows of G. This is what the released code does.

    Args:
        paired, block, calls: as for ``BlockLoss``.
        rank: number of rows.
        steps: number of steps of the training.
    """

    def __init__(self, paired: PairedForward, block: int, calls: Sequence[BlockCall], rank: int, steps: int) -> None:
        super().__init__(paired, block, calls)
        self.rank, self.interval, self.done = rank, max(1, steps // rank), 0
        self.forms: dict[Shape, LowRankForm] = {}
        self.first: tuple[Tensor, Tensor] | None = None

    def __call__(self, call: BlockCall) -> Tensor:
        if self.done % self.interval == 0 and self.done // self.interval < self.rank:
            self.extend()
        self.done += 1
        delta = error(call, self.output(call))
        terms = self.forms[tuple(delta.shape[1:])].terms(delta)
        if self.first is None:
            self.first = terms[0].detach().clamp(min=TINY), terms[1].detach().clamp(min=TINY)
        return terms[0] / self.first[0] + terms[1] / self.first[1]

    @torch.no_grad()
    def extend(self) -> None:
        """Add the rows of the model as it is, if they are finite."""
        for shape, (gradient, delta) in mean_sizes(self._pairs()).items():
            if shape not in self.forms or bool(gradient.isfinite().all() & delta.isfinite().all()):
                self.forms[shape] = LowRankForm.extended(self.forms.get(shape), gradient, delta)
        self.first = None

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for call in self.calls:
            output = self.output(call)
            yield masked(self.gradient(call, output), call), error(call, output)

    @torch.no_grad()
    def of_all(self, calls: Sequence[BlockCall]) -> float:
        """The mean divergence itself: the form changes during training."""
        found = []
        for call in calls:
            output = self.output(call)
            assert call.outputs is not None
            found.append(divergence(self.finished(call, output, first_tensor(output)), call.outputs))
        return float(torch.cat(found).double().mean())


def mean_sizes(pairs: Iterator[tuple[Tensor, Tensor]]) -> dict[Shape, tuple[Tensor, Tensor]]:
    """Means over samples of the absolute values of pairs of tensors, by shape without the samples."""
    sums: dict[Shape, tuple[Tensor, Tensor]] = {}
    counts: dict[Shape, int] = {}
    for left, right in pairs:
        shape = tuple(left.shape[1:])
        before = sums.get(shape, (torch.zeros_like(left[0]), torch.zeros_like(right[0])))
        sums[shape] = before[0] + left.abs().sum(0), before[1] + right.abs().sum(0)
        counts[shape] = counts.get(shape, 0) + len(left)
    return {shape: (left / counts[shape], right / counts[shape]) for shape, (left, right) in sums.items()}


class LowRankForm:
    """The form of ``LowRankLoss`` for entries of one shape.

    Args:
        gradients: G, ``(rank, entries)`` float32.
        deltas: D, same shape.
    """

    def __init__(self, gradients: Tensor, deltas: Tensor) -> None:
        self.gradients, self.deltas = gradients, deltas
        wide = deltas.double()
        # Rows of D are alike, and the inverse is large: in float32 the form would have negative values.
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        self.root = vectors[:, kept] / values[kept].sqrt()  # (D Dᵀ)⁻¹ = R Rᵀ

    @classmethod
    def extended(cls, form: LowRankForm | None, gradient: Tensor, delta: Tensor) -> LowRankForm:
        """A form with one more row, of the shape of z."""
        rows = gradient.reshape(1, -1), delta.reshape(1, -1)
        if form is None:
            return cls(*rows)
        return cls(torch.cat([form.gradients, rows[0]]), torch.cat([form.deltas, rows[1]]))

    def terms(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of low rank and of the diagonal, means over samples."""
        size = delta.abs().flatten(1)
        projected = size.double() @ self.gradients.double().T  # (samples, rank)
        low = (projected @ self.root).square().sum(1).mean().float()
        return low, (size.square() @ self.gradients.mean(0)).mean()


class LeastSquaresLoss(BlockLoss):
    """``½ Σ_i H_i Δz_i² + ½ (uᵀ Δz)²``, relative to its value before training (LS-ViT).

    With g = ``∂D/∂z`` and Δz of the block as it is before training, sums over samples:
    ``H_i = Σ g_i Δz_i / Σ Δz_i²`` and ``u = Σ g √(Δzᵀg) / Σ Δzᵀg``. Negative H_i and samples with negative Δzᵀg, of
    which the source says nothing, count 0.
    """

    def __init__(self, paired: PairedForward, block: int, calls: Sequence[BlockCall]) -> None:
        super().__init__(paired, block, calls)
        sums: dict[Shape, list[Tensor]] = {}
        with torch.no_grad():
            for call in calls:
                output = self.output(call)
                delta, gradient = error(call, output), masked(self.gradient(call, output), call)
                parts = least_squares_sums(delta.flatten(1), gradient.flatten(1))
                shape = tuple(delta.shape[1:])
                sums[shape] = [a + b for a, b in zip(sums[shape], parts, strict=True)] if shape in sums else parts
            self.forms = {shape: least_squares_form(*parts) for shape, parts in sums.items()}
            self.level = 1.0
            self.level = max(self.of_all(calls), TINY)

    def __call__(self, call: BlockCall) -> Tensor:
        delta = error(call, self.output(call))
        diagonal, vector = self.forms[tuple(delta.shape[1:])]
        flat = delta.flatten(1)
        return 0.5 * (flat.square() @ diagonal + (flat @ vector).square()).mean() / self.level


def least_squares_sums(delta: Tensor, gradient: Tensor) -> list[Tensor]:
    """``Σ g Δz``, ``Σ Δz²``, ``Σ g √(Δzᵀg)`` and ``Σ Δzᵀg`` over samples, of ``(samples, entries)``."""
    inner = (delta * gradient).sum(1).clamp(min=0)
    return [(gradient * delta).sum(0), delta.square().sum(0), inner.sqrt() @ gradient, inner.sum()]


def least_squares_form(product: Tensor, square: Tensor, rooted: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """``(H, u)`` of the sums of all samples; 0 where nothing changed."""
    diagonal = torch.where(square > TINY, product / square.clamp(min=TINY), torch.zeros_like(square))
    return diagonal.clamp(min=0), rooted / inner.clamp(min=TINY)


class FeatureLoss(BlockLoss):
    """``‖f̂ - f‖² / C`` of the head's input f plus ``λ ‖Δz‖² / (N C)``, each relative to its first value (GLF-Q).

    Args:
        paired, block, calls: as for ``BlockLoss``.
        local_weight: λ.
    """

    def __init__(self, paired: PairedForward, block: int, calls: Sequence[BlockCall], local_weight: float) -> None:
        super().__init__(paired, block, calls)
        self.local_weight = local_weight
        with torch.no_grad():
            outputs = zip(calls, paired.float_outputs(block), strict=True)
            self.features = {id(call): paired.penultimate(call, block + 1, output) for call, output in outputs}
            self.first = [torch.ones(())] * 2
            self.first = [term.clamp(min=1e-12) for term in self.terms(calls[0])]

    def terms(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """The global and the local term of one batch."""
        output = self.output(call)
        feature = self.paired.penultimate(call, self.block + 1, output)
        delta = error(call, output)
        counted = delta.numel() if call.weights is None else float(call.weights.sum()) * delta.shape[-1]
        return (feature - self.features[id(call)]).square().mean(), delta.square().sum() / max(1.0, counted)

    def __call__(self, call: BlockCall) -> Tensor:
        feature, local = self.terms(call)
        return feature / self.first[0] + self.local_weight * local / self.first[1]
