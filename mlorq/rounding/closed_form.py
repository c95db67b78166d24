"""Rounding in closed form from the inputs of the partly compressed model (METHOD 7).

``gptq`` (arXiv 2210.17323) rounds W under ``Σ̃ = E[x̃ x̃ᵀ]``. ``closed_form`` first moves W to where it makes up for what
the layers before have changed: the best float weight for inputs x̃ and the float layer's outputs is

    W* = W + W C (Σ̃ + λI)⁻¹,   C = E[(x - x̃) x̃ᵀ],

a ridge on the change (ERQ's activation step, arXiv 2407.06794; GPTAQ, arXiv 2504.02692). λ is chosen on folds of the
samples, none at all (no change) among the choices. Where a layer has a bias, moments are taken about the means, and the
bias makes up for the mean error: ``b̂ = b + W E[x] - Ŵ E[x̃]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mlorq.calibration.covariance import shrink
from mlorq.fitting.covariance_fit import ClosedForm, Metric
from mlorq.fitting.hessian_fit import LayerSearch, stored
from mlorq.forms.base import Candidate
from mlorq.rounding.base import RoundingResult, RoundingSettings, output_error
from mlorq.rounding.paired_forward import InputMoments

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal of Σ̃
LIFTS = (0.0, 1e-6, 1e-5, 1e-4)  # of the diagonal about the means, times the mean diagonal about zero


def round_gptq(
    name: str,
    search: LayerSearch,
    candidate: Candidate,
    moments: InputMoments | None,
    settings: RoundingSettings,
    progress: Callable[[int, int], None] | None = None,
    bias: Tensor | None = None,
) -> RoundingResult:
    """Round one layer by GPTQ under the inputs of the compressed model."""
    assert moments is not None, "gptq needs the moments of the layer's inputs"
    closed = closed_form(search, search.weight, moments)
    return _result(name, search, candidate, closed, moments)


def round_closed_form(
    name: str,
    search: LayerSearch,
    candidate: Candidate,
    moments: InputMoments | None,
    settings: RoundingSettings,
    progress: Callable[[int, int], None] | None = None,
    bias: Tensor | None = None,
) -> RoundingResult:
    """Round one layer with error feedback, and refit its bias.

    Args:
        name: the layer's name.
        search: its weight and settings.
        candidate: its form.
        moments: of its inputs; required.
        settings: not read.
        progress: not called: there are no iterations.
        bias: the float layer's, ``(out_features,)``; None where it has none, or none of its own.
    """
    assert moments is not None, "closed_form needs the moments of the layer's inputs"
    if bias is None or moments.mean is None or moments.drift_mean is None:
        return _with_feedback(name, search, candidate, moments)
    result = _about_the_means(name, search, candidate, moments)
    w, rounded = search.weight.double(), result.layer.dense().to(search.weight.device).double()
    shift = (w - rounded) @ moments.mean + w @ moments.drift_mean
    return replace(result, layer=replace(result.layer, bias=(bias.double() + shift).float().cpu()))


def _with_feedback(name: str, search: LayerSearch, candidate: Candidate, used: InputMoments) -> RoundingResult:
    target = corrected_weight(search.weight, used)
    return _result(name, search, candidate, closed_form(search, target, used), used)


def _about_the_means(name: str, search: LayerSearch, candidate: Candidate, moments: InputMoments) -> RoundingResult:
    """With moments about the means, made definite where inputs hardly vary.

    There the sums' own float32 error, a share of the moments about zero, is larger than what is left about the means.
    """
    centred = moments.centred()
    level = float(moments.compressed.diagonal().mean())
    for lift in LIFTS:
        used = centred if lift == 0 else _lifted(centred, lift * level)
        try:
            return _with_feedback(name, search, candidate, used)
        except torch.linalg.LinAlgError:  # not positive definite
            continue
    return _with_feedback(name, search, candidate, moments)


def _lifted(moments: InputMoments, amount: float) -> InputMoments:
    identity = torch.eye(len(moments.compressed), dtype=torch.float64, device=moments.compressed.device)
    folds = tuple(_lifted(fold, amount) for fold in moments.folds)
    return replace(moments, compressed=moments.compressed + amount * identity, folds=folds)


def corrected_weight(weight: Tensor, moments: InputMoments) -> Tensor:
    """``W* = W + W C (Σ̃ + λI)⁻¹`` with the λ whose fits on either fold serve the other one best, float64.

    W itself where nothing does better, or where there are no folds to tell.

    Args:
        weight: W, ``(out_features, in_features)``.
        moments: of the layer's inputs, with their folds.
    """
    w = weight.double()
    level = float(moments.compressed.diagonal().mean())
    if len(moments.folds) < 2 or level <= 0:
        return w
    first, second = moments.folds
    best, least = 0.0, sum(output_error(w, w, fold) for fold in moments.folds)
    for ridge in RIDGES:
        error = output_error(w, _moved(w, first, ridge * level), second)
        error += output_error(w, _moved(w, second, ridge * level), first)
        if error < least:
            best, least = ridge, error
    return _moved(w, moments, best * level) if best else w


def _moved(weight: Tensor, moments: InputMoments, ridge: float) -> Tensor:
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    factor = torch.linalg.cholesky(moments.compressed + ridge * identity)
    return weight + torch.cholesky_solve((weight @ moments.drift_cross).T, factor).T


def closed_form(search: LayerSearch, target: Tensor, moments: InputMoments) -> ClosedForm:
    """Closed forms for a target weight under the inputs of the compressed model."""
    metric = Metric(shrink(moments.compressed, moments.tokens), search.output_metric())
    return ClosedForm(target, metric, search.settings.percentiles, search.settings.zero_point)


def _result(
    name: str, search: LayerSearch, candidate: Candidate, closed: ClosedForm, moments: InputMoments
) -> RoundingResult:
    layer = stored(name, candidate, closed.rounded(candidate), search.settings.zero_point)
    device = search.weight.device
    before = output_error(search.weight, LayerSearch.realise(search, name, candidate).dense().to(device), moments)
    after = output_error(search.weight, layer.dense().to(device), moments)
    return RoundingResult(layer, before, after)
