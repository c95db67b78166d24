"""Rounding in closed form with input moments of the partly compressed model (METHOD 7).

Without feedback W is rounded under ``Σ̃ = E[x̃ x̃ᵀ]`` (GPTQ, arXiv 2210.17323). With feedback W is first corrected for
the errors of the layers before: the best float weight for inputs x̃ and the float layer's outputs is

    W* = W + W C (Σ̃ + λI)⁻¹,   C = E[(x - x̃) x̃ᵀ],

with a ridge penalty on the change (activation step of ERQ, arXiv 2407.06794; GPTAQ, arXiv 2504.02692). λ, or no change
at all, is chosen by two-fold cross-validation. If the layer has a bias, moments are centred, and the bias compensates
for the mean error: ``b̂ = b + W E[x] - Ŵ E[x̃]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mlorq.calibration.blocks import diagonal, identity, multiply, of_diagonal, solve
from mlorq.calibration.covariance import LEAST_SQUARE, shrink
from mlorq.codecs.base import FittedMatrix
from mlorq.fitting.covariance_fit import CovarianceFit, Metric
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.rounding.base import RoundingResult, RoundingTask
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # values of λ over the mean diagonal of Σ̃
JUDGING_ROWS = 128  # at most, of a layer's rows, that choose λ
FAR = 1.25  # a closed form with more than this times the error of nearest rounding is not used
DAMPINGS = (0.0, 1e-6, 1e-5, 1e-4)  # added to the diagonal of centred Σ̃, over the mean diagonal of Σ̃


class Tried(NamedTuple):
    """A rounded layer.

    Attributes:
        parts: its matrices by name.
        layer: as it is stored.
        error: its output error.
        nearest: that of nearest rounding; None for codes that are found together.
    """

    parts: Mapping[str, FittedMatrix]
    layer: CompressedLayer
    error: float
    nearest: float | None = None


def round_without_feedback(task: RoundingTask) -> RoundingResult:
    """Round one layer by GPTQ under Σ̃; the task must have moments."""
    assert task.moments is not None
    return _result(task, task.fit.weight, task.moments)


def round_with_feedback(task: RoundingTask) -> RoundingResult:
    """Round one layer with error feedback, and refit its bias if it has one; the task must have moments."""
    moments, bias = task.moments, task.bias
    assert moments is not None
    if bias is None or moments.mean is None or moments.drift_mean is None:
        return _with_feedback(task, moments)
    result = _with_centred_feedback(task, moments)
    w = task.fit.weight.double()
    rounded = result.layer.dense().to(w.device).double()
    shift = (w - rounded) @ moments.mean + w @ moments.drift_mean
    return replace(result, layer=replace(result.layer, bias=(bias.double() + shift).float().cpu()))


def _with_feedback(task: RoundingTask, used: InputMoments) -> RoundingResult:
    return _result(task, corrected_weight(task.fit.weight, used), used)


def _with_centred_feedback(task: RoundingTask, moments: InputMoments) -> RoundingResult:
    """Error feedback with centred moments, damped if they are not positive definite.

    If inputs hardly vary, the float32 errors of the raw moments exceed the centred moments.
    """
    centred = moments.centred()
    level = float(diagonal(moments.compressed).mean())
    for damping in DAMPINGS:
        used = centred if damping == 0 else _damped(centred, damping * level)
        try:
            return _with_feedback(task, used)
        except torch.linalg.LinAlgError:  # not positive definite
            continue
    return _with_feedback(task, moments)


def _damped(moments: InputMoments, amount: float) -> InputMoments:
    folds = tuple(_damped(fold, amount) for fold in moments.folds)
    return replace(moments, compressed=moments.compressed + amount * identity(moments.compressed), folds=folds)


def corrected_weight(weight: Tensor, moments: InputMoments) -> Tensor:
    """``W* = W + W C (Σ̃ + λI)⁻¹``, float64, with λ chosen by two-fold cross-validation of the output error.

    W itself if no λ reduces the error, without two folds, or for inputs that vanish (``LEAST_SQUARE``). Of large
    layers, every so many rows are judged: λ is one number for all of them, and trying it on all would cost more than
    all the rest of rounding.

    Args:
        weight: W, ``(out_features, in_features)``.
        moments: second moments of the layer's inputs, with their folds.
    """
    w = weight.double()
    level = float(diagonal(moments.compressed).mean())
    if len(moments.folds) < 2 or level <= LEAST_SQUARE:
        return w
    judging = w[:: -(-len(w) // JUDGING_ROWS)]
    crosses = [multiply(judging, fold.drift_cross) for fold in moments.folds]  # W C
    (first, second), (own, other) = moments.folds, crosses
    best, least = 0.0, 0.0
    for ridge in RIDGES:
        error = _error_change(_ridge_change(own, first, ridge * level), second, other)
        error += _error_change(_ridge_change(other, second, ridge * level), first, own)
        if error < least:
            best, least = ridge, error
    return ridge_correction(w, moments, best * level) if best else w


def ridge_correction(weight: Tensor, moments: InputMoments, ridge: float) -> Tensor:
    """``W* = W + W C (Σ̃ + λI)⁻¹`` for a given λ (METHOD 7, 9).

    Args:
        weight: W, ``(out_features, in_features)`` float64.
        moments: second moments of the layer's inputs.
        ridge: λ, in units of Σ̃.

    Raises:
        torch.linalg.LinAlgError: ``Σ̃ + λI`` is not positive definite.
    """
    return weight + _ridge_change(multiply(weight, moments.drift_cross), moments, ridge)


def _ridge_change(cross: Tensor, moments: InputMoments, ridge: float) -> Tensor:
    """``W C (Σ̃ + λI)⁻¹`` from W C, ``(out_features, in_features)``."""
    factor = torch.linalg.cholesky(moments.compressed + ridge * identity(moments.compressed))
    return solve(cross, factor)


def _error_change(change: Tensor, moments: InputMoments, cross: Tensor) -> float:
    """By how much a change Δ of W raises the output error (``output_error``): ``tr(Δ Σ̃ Δᵀ) - 2 tr(Δ (W C)ᵀ)``."""
    return float((multiply(change, moments.compressed) * change).sum() - 2 * (change * cross).sum())


def fit_under(task: RoundingTask, target: Tensor, moments: InputMoments) -> CovarianceFit:
    """Closed forms of a target weight, ``(out_features, in_features)``, under shrunk Σ̃ and the task's output metric."""
    return _fit(task, target, shrink(moments.compressed, moments.tokens))


def _fit(task: RoundingTask, target: Tensor, inputs: Tensor) -> CovarianceFit:
    metric = Metric(inputs, task.output_metric())
    return CovarianceFit(target, metric, task.fit.percentiles, task.fit.zero_point, task.fit.settings.rotation)


def balanced(moments: InputMoments, target: Tensor) -> Tensor:
    """Σ̃ shrunk so that no column of a weight gains more than the mean power of a column.

    ``shrink`` adds the same variance to every input. Where large weights make up for a small input, the errors of that
    input alone would then decide scales and codes.

    Args:
        moments: with Σ̃.
        target: the weight, ``(out_features, in_features)``.
    """
    plain, own = shrink(moments.compressed, moments.tokens), diagonal(moments.compressed)
    gained = (diagonal(plain) - own).clamp(min=0)
    power = target.double().square().sum(0)
    most = (power * own).mean() / power.clamp(min=torch.finfo(power.dtype).tiny)
    return plain - of_diagonal((gained - most).clamp(min=0), plain.shape[-1])


def best_parts(task: RoundingTask, target: Tensor, moments: InputMoments) -> Tried:
    """The target weight rounded in closed form; if that is far behind nearest rounding, the best of further ways."""

    def tried(fit: CovarianceFit | None) -> Tried:
        parts = task.rounded(fit)
        layer = CompressedLayer.of_rounded(task.layer, task.candidate, parts)
        return Tried(parts, layer, output_error(weight, layer.dense().to(weight.device), moments))

    weight = task.fit.weight
    found = tried(fit_under(task, target, moments))
    if task.form.separate:
        nearest = tried(None)
        found = found._replace(nearest=nearest.error)
        if found.error <= FAR * nearest.error:
            return found
    else:  # there is no cheap nearest rounding of codes that are found together
        if found.error <= output_error(weight, torch.zeros_like(weight), moments):
            return found
        nearest = tried(None)
    others = (nearest, tried(_fit(task, target, balanced(moments, target))))
    return min(found, *others, key=lambda one: one.error)._replace(nearest=found.nearest)


def _result(task: RoundingTask, target: Tensor, moments: InputMoments) -> RoundingResult:
    found = best_parts(task, target, moments)
    return RoundingResult(found.layer, found.nearest, found.error)
