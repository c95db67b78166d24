"""Low-rank-aware adaptive rounding (METHOD 6; MLoRQ, arXiv 2507.09616; AdaRound, arXiv 2004.10568).

Every code is ``floor(w/s) + h(α) + z`` with a rectified sigmoid ``h(α) = clamp(σ(α)(ζ-γ)+γ, 0, 1)``, ``γ = -0.1``,
``ζ = 1.1``; α starts where h(α) is the fractional part and the final code rounds up where ``α ≥ 0``. The α of all
matrices that a form stores are learned jointly, those of both factors through ``A B x̃``. The loss is the output error
plus ``λ Σ mean(1 - |2h(α)-1|^β)``.

The output error is quadratic in Ŵ = Â B̂, so its gradient is written with the second moments of the inputs: every step
sees all calibration tokens, where the published code draws 32 images a step, at a cost that does not depend on their
number, and the optimiser has no sampling noise to average out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlorq.codecs.affine import RowQuantizer, store_matrix
from mlorq.fitting.cuda import has_kernels, recorded
from mlorq.fitting.hessian_fit import LayerSearch
from mlorq.forms.base import Candidate, CompressedLayer, combine
from mlorq.rounding.base import RoundingResult, RoundingSettings, output_error
from mlorq.rounding.closed_form import closed_form
from mlorq.rounding.erq import moved_search
from mlorq.rounding.paired_forward import InputMoments

GAMMA, ZETA = -0.1, 1.1
DECAYS, EPSILON = (0.9, 0.999), 1e-8  # of RAdam, as in torch.optim
CHECK_EVERY = 50  # iterations between looks at the exact loss


@dataclass
class _SoftMatrix:
    """One matrix with learnable rounding.

    Attributes:
        base: ``floor(w/s) + z``, ``(rows, columns)``.
        quantizer: its scales and zero-points.
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
        """Dequantized values, h(α), and the derivative of the values by h (0 where the code is clamped)."""
        h = (self.alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)
        codes = self.base + h
        top = 2**self.quantizer.bits - 1
        inside = (codes >= 0) & (codes <= top)
        slope = inside * self.quantizer.scale.unsqueeze(1)
        return self.quantizer.dequantize(codes.clamp_(0, top)), h, slope

    def hard_codes(self) -> Tensor:
        """Final codes: up where ``α ≥ 0``."""
        return (self.base + (self.alpha >= 0)).clamp(0, 2**self.quantizer.bits - 1)

    def alpha_gradient(self, values: Tensor, h: Tensor, slope: Tensor, beta: float, weight: float) -> Tensor:
        """Gradient by α of loss and regulariser, given the loss's gradient by the dequantized values."""
        centred = 2 * h - 1
        # d/dh of mean(1 - |2h-1|^β)
        pull = -2 * beta * centred.sign() * centred.abs().pow(beta - 1) / h.numel()
        sigmoid = self.alpha.sigmoid()
        rising = (ZETA - GAMMA) * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        return (values * slope + weight * pull) * rising


class _Objective:
    """Gradient of ``E‖W x - Ŵ x̃‖² / out_features`` by the stored matrices."""

    def __init__(self, weight: Tensor, moments: InputMoments) -> None:
        w = weight.double()
        self.weight = weight
        self.moments = moments
        self.compressed = moments.compressed.float()
        # E[W x x̃ᵀ] = W (Σ̃ + C): what Ŵ Σ̃ is pulled towards.
        self.target = (w @ (moments.compressed + moments.drift_cross)).float()
        self.offset = (w @ moments.drift_cross).float()
        self.factor = 2.0 / weight.shape[0]

    def gradients(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """By each of the matrices that a form stores."""
        found: dict[str, Tensor] = {}
        target = self.target
        if "weight" in values:
            dense = combine(values)
            by_weight = (dense - self.weight) @ self.compressed - self.offset
            found["weight"] = self.factor * by_weight
            if "a" in values:
                found["a"] = self.factor * (by_weight @ values["b"].T)
                found["b"] = self.factor * (values["a"].T @ by_weight)
            return found
        a, b = values["a"], values["b"]
        projected = b @ self.compressed  # (rank, in_features)
        found["a"] = self.factor * (a @ (projected @ b.T) - target @ b.T)
        found["b"] = self.factor * ((a.T @ a) @ projected - a.T @ target)
        return found

    def exact(self, values: dict[str, Tensor]) -> float:
        """The output error itself, in float64."""
        return output_error(self.weight, combine({key: value.double() for key, value in values.items()}), self.moments)


def round_lra(
    name: str,
    search: LayerSearch,
    candidate: Candidate,
    moments: InputMoments | None,
    settings: RoundingSettings,
    progress: Callable[[int, int], None] | None = None,
    bias: Tensor | None = None,
) -> RoundingResult:
    """Learn the rounding of one layer's codes; nearest rounding is kept where learning does not lower the error.

    Args:
        name: the layer's name.
        search: its matrices and quantizers.
        candidate: its form.
        moments: of its inputs; required.
        settings: iterations, step size, regulariser.
        progress: called with (iterations done, iterations).
        bias: not read: the codes alone are learned.
    """
    assert moments is not None, "lra needs the moments of the layer's inputs"
    parts = (moved_search(search, moments) if settings.start == "erq" else search).quantized_parts(candidate)
    if settings.start == "closed_form":
        parts = _closed_form_parts(search, candidate, moments)
    soft = {key: _SoftMatrix.start(values, quantizer) for key, (values, quantizer) in parts.items()}
    objective = _Objective(search.weight, moments)
    nearest = {key: quantizer.quantize(values) for key, (values, quantizer) in parts.items()}
    before = objective.exact({key: parts[key][1].dequantize(codes) for key, codes in nearest.items()})
    done = _optimise(soft, objective, settings, progress)
    learned = {key: matrix.hard_codes() for key, matrix in soft.items()}
    after = objective.exact({key: parts[key][1].dequantize(codes) for key, codes in learned.items()})
    codes, after = (learned, after) if after < before else (nearest, before)
    matrices = {key: store_matrix(values, parts[key][1], search.settings.zero_point) for key, values in codes.items()}
    return RoundingResult(CompressedLayer(name, candidate, matrices), before, after, done)


def _closed_form_parts(
    search: LayerSearch, candidate: Candidate, moments: InputMoments
) -> dict[str, tuple[Tensor, RowQuantizer]]:
    """Matrices whose nearest rounding is that of the closed form."""
    found = closed_form(search, search.weight, moments).rounded(candidate)
    return {name: (part.latent(), part.quantizer) for name, part in found.items()}


def _optimise(
    matrices: dict[str, _SoftMatrix],
    objective: _Objective,
    settings: RoundingSettings,
    progress: Callable[[int, int], None] | None,
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
    matrices: dict[str, _SoftMatrix], objective: _Objective, settings: RoundingSettings, betas: list[float]
) -> Callable[[], None]:
    """What does the next iteration."""
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
    matrices: dict[str, _SoftMatrix], objective: _Objective, settings: RoundingSettings, betas: list[float]
) -> Callable[[], None]:
    """The same by kernels for CUDA, recorded."""
    from mlorq.rounding.lra_kernels import FusedMatrix, Iterations

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


def radam_scalars(step: int, learning_rate: float) -> tuple[float, float]:
    """What RAdam (arXiv 1908.03265) multiplies the first moment with, and the second one's inverse root.

    Args:
        step: from 1.
        learning_rate: its own.

    Returns:
        The rate over the first bias correction, and rectification times the root of the second one's: 0 in the first
        steps, in which the second moment is not used.
    """
    first, second = DECAYS
    most = 2 / (1 - second) - 1
    length = most - 2 * step * second**step / (1 - second**step)
    rate = learning_rate / (1 - first**step)
    if length <= 5:
        return rate, 0.0
    rectification = ((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) ** 0.5
    return rate, rectification * (1 - second**step) ** 0.5
