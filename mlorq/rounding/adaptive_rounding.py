"""Low-rank-aware adaptive rounding (METHOD 6; MLoRQ, arXiv 2507.09616; AdaRound, arXiv 2004.10568).

Every code is ``floor(w/s) + h(α) + z`` with the rectified sigmoid ``h(α) = clamp(σ(α)(ζ-γ)+γ, 0, 1)``, ``γ = -0.1``,
``ζ = 1.1``. Initially h(α) is the fractional part of w/s; final codes round up if ``α ≥ 0``. The α of all matrices of a
form are learned jointly, those of both factors through ``A B x̃``. The loss is the output error plus the regulariser
``λ Σ mean(1 - |2h(α)-1|^β)``.

The output error is quadratic in Ŵ = Â B̂, so its gradient depends on the inputs only through their second moments. Every
iteration uses all calibration tokens at a cost independent of their number and without sampling noise; the published
code draws 32 images per iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlorq.calibration.blocks import multiply
from mlorq.codecs.affine import RowQuantizer
from mlorq.codecs.base import StoredMatrix
from mlorq.fitting.cuda import has_kernels, recorded
from mlorq.forms.base import FORMS, Form
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.rounding.base import Parts, Progress, RoundingResult, RoundingTask
from mlorq.rounding.lra import LraSettings
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments
from mlorq.rounding.rectified_sigmoid import GAMMA, ZETA

CHECK_EVERY = 50  # iterations between evaluations of the exact loss


@dataclass
class _SoftMatrix:
    """A matrix with learnable rounding.

    Attributes:
        base: ``floor(w/s) + z``, ``(rows, columns)``.
        quantizer: scales and zero-points of the rows.
        alpha: ``(rows, columns)``, learned.
    """

    base: Tensor
    quantizer: RowQuantizer
    alpha: Tensor

    @classmethod
    def start(cls, values: Tensor, quantizer: RowQuantizer) -> _SoftMatrix:
        scaled = values / quantizer.scale.unsqueeze(1)
        floor = scaled.floor()
        fraction = ((scaled - floor) - GAMMA) / (ZETA - GAMMA)
        return cls(floor + quantizer.zero_point.unsqueeze(1), quantizer, torch.logit(fraction).contiguous())

    def soft(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dequantized values, h(α), and the derivative of the values by h (0 if the code is clamped)."""
        h = (self.alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)
        codes = self.base + h
        top = 2**self.quantizer.bits - 1
        inside = (codes >= 0) & (codes <= top)
        slope = inside * self.quantizer.scale.unsqueeze(1)
        return self.quantizer.dequantize(codes.clamp_(0, top)), h, slope

    def hard_codes(self) -> Tensor:
        """Final codes, rounded up if ``α ≥ 0``."""
        return (self.base + (self.alpha >= 0)).clamp(0, 2**self.quantizer.bits - 1)

    def alpha_gradient(self, by_values: Tensor, h: Tensor, slope: Tensor, beta: float, weight: float) -> Tensor:
        """Gradient of loss and regulariser by α, given the gradient of the loss by the dequantized values."""
        centred = 2 * h - 1
        # d/dh of mean(1 - |2h-1|^β)
        pull = -2 * beta * centred.sign() * centred.abs().pow(beta - 1) / h.numel()
        sigmoid = self.alpha.sigmoid()
        rising = (ZETA - GAMMA) * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        return (by_values * slope + weight * pull) * rising


class _Objective:
    """The output error ``E‖W x - Ŵ x̃‖² / out_features`` and its gradient by the stored matrices."""

    def __init__(self, weight: Tensor, moments: InputMoments, form: Form[Any]) -> None:
        w = weight.double()
        self.form = form
        self.weight = weight
        self.moments = moments
        self.compressed = moments.compressed.float()
        # E[W x x̃ᵀ] = W (Σ̃ + C), the value of Ŵ Σ̃ at which the gradient is 0.
        self.target = multiply(w, moments.compressed + moments.drift_cross).float()
        self.offset = multiply(w, moments.drift_cross).float()
        self.factor = 2.0 / weight.shape[0]

    def gradients(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by the matrices of the form, given their values."""
        if [len(term) for term in self.form.terms] == [2]:  # one product alone: Ŵ Σ̃ is not formed
            left, right = self.form.terms[0]
            a, b = values[left], values[right]
            projected = multiply(b, self.compressed)  # (rank, in_features)
            return {
                left: self.factor * (a @ (projected @ b.T) - self.target @ b.T),
                right: self.factor * ((a.T @ a) @ projected - a.T @ self.target),
            }
        by_dense = multiply(self.form.combine(values) - self.weight, self.compressed) - self.offset
        found: dict[str, Tensor] = {}
        for term in self.form.terms:
            for index, name in enumerate(term):
                gradient = by_dense
                for before in term[:index]:
                    gradient = values[before].T @ gradient
                for after in reversed(term[index + 1 :]):
                    gradient = gradient @ values[after].T
                found[name] = self.factor * gradient
        return found

    def exact(self, values: dict[str, Tensor]) -> float:
        """The output error, in float64."""
        dense = self.form.combine({key: value.double() for key, value in values.items()})
        return output_error(self.weight, dense, self.moments)


def round_adaptively(
    task: RoundingTask, parts: Parts, settings: LraSettings, progress: Progress | None = None
) -> RoundingResult:
    """Learn the rounding of one layer's codes; nearest rounding is kept if learning does not reduce the error.

    Args:
        task: the layer, with moments of its inputs.
        parts: float matrices and quantizers, by the form's names.
        settings: iterations, step size and regulariser.
        progress: called with (iterations done, iterations).
    """
    assert task.moments is not None
    soft = {key: _SoftMatrix.start(values, quantizer) for key, (values, quantizer) in parts.items()}
    objective = _Objective(task.fit.weight, task.moments, FORMS[task.candidate.form])
    nearest = {key: quantizer.quantize(values) for key, (values, quantizer) in parts.items()}
    before = objective.exact({key: parts[key][1].dequantize(codes) for key, codes in nearest.items()})
    done = _optimise(soft, objective, settings, progress)
    learned = {key: matrix.hard_codes() for key, matrix in soft.items()}
    after = objective.exact({key: parts[key][1].dequantize(codes) for key, codes in learned.items()})
    codes, after = (learned, after) if after < before else (nearest, before)
    matrices: dict[str, StoredMatrix] = {key: parts[key][1].store(values) for key, values in codes.items()}
    return RoundingResult(CompressedLayer(task.layer, task.candidate, matrices), before, after, done)


def _optimise(
    matrices: dict[str, _SoftMatrix],
    objective: _Objective,
    settings: LraSettings,
    progress: Progress | None,
) -> int:
    warm = settings.warm_up * settings.iterations
    betas = []
    for iteration in range(settings.iterations):
        share = max(0.0, (iteration - warm) / max(1.0, settings.iterations - warm))
        betas.append(settings.beta_start + (settings.beta_end - settings.beta_start) * share)
    fused = has_kernels(objective.weight.device)
    step = (_fused_step if fused else _step)(matrices, objective, settings, betas)
    for iteration in range(settings.iterations):
        if iteration % CHECK_EVERY == 0:
            if progress is not None:
                progress(iteration, settings.iterations)
            values = {key: matrix.soft()[0] for key, matrix in matrices.items()}
            if objective.exact(values) < settings.stop_loss:
                return iteration
        step()
    return settings.iterations


def _step(
    matrices: dict[str, _SoftMatrix], objective: _Objective, settings: LraSettings, betas: list[float]
) -> Callable[[], None]:
    """A function that performs the next iteration."""
    optimiser = torch.optim.RAdam([matrix.alpha for matrix in matrices.values()], lr=settings.learning_rate)
    exponents = iter(betas)

    def step() -> None:
        soft = {key: matrix.soft() for key, matrix in matrices.items()}
        gradients = objective.gradients({key: values for key, (values, _, _) in soft.items()})
        beta = next(exponents)
        for key, matrix in matrices.items():
            _, h, slope = soft[key]
            matrix.alpha.grad = matrix.alpha_gradient(gradients[key], h, slope, beta, settings.regularisation)
        optimiser.step()

    return step


def _fused_step(
    matrices: dict[str, _SoftMatrix], objective: _Objective, settings: LraSettings, betas: list[float]
) -> Callable[[], None]:
    """The same with Triton kernels, recorded as a CUDA graph."""
    from mlorq.rounding.adaptive_rounding_kernels import FusedMatrix, Iterations

    iterations = Iterations(betas, settings.learning_rate, objective.weight.device)
    fused = {
        key: FusedMatrix(
            matrix.alpha,
            matrix.base,
            matrix.quantizer.scale,
            matrix.quantizer.zero_point,
            2**matrix.quantizer.bits - 1,
        )
        for key, matrix in matrices.items()
    }

    def step() -> None:
        gradients = objective.gradients({key: matrix.values() for key, matrix in fused.items()})
        for key, matrix in fused.items():
            matrix.descend(gradients[key], iterations, settings.regularisation)
        iterations.done()

    return recorded(step)
