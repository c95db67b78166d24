"""ERQ: two ridge regressions around the rounding of a layer (arXiv 2407.06794; METHOD 9).

1. Activation error (Aqer): ``W* = W + W C (Σ̃ + λ₁I)⁻¹`` compensates for quantized inputs, with a ridge penalty on the
   change. The formula is that of ``error_feedback``, with the published λ₁, which applies to sums over tokens.
2. Weight error (Wqer): half of the remaining columns are rounded at a time. Flips of single codes reduce the proxy
   error ``δ Σ̃_ss δᵀ`` of each row; a ridge regression then compensates for the remaining error δ in the columns that
   are not rounded yet: ``w_r ← w_r - δ Σ̃_sr (Σ̃_rr + λ₂I)⁻¹``.

A flip changes a code to the code on the other side of its value. The published code flips by the sign of the gradient;
here each iteration makes the flip in each row that reduces the error most, until no flip does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlorq.calibration.blocks import diagonal, parts
from mlorq.codecs.affine import Rounded, RowQuantizer
from mlorq.codecs.base import FittedMatrix
from mlorq.fitting.gram import damped
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.rounding.base import RoundingResult, RoundingTask
from mlorq.rounding.error_feedback import FAR, ridge_correction
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments

TOKEN_RIDGE, VECTOR_RIDGE = 2000.0, 0.1  # λ₁ on sums, for inputs with tokens and with one vector per sample
WEIGHT_RIDGE = 1e-2  # λ₂ over the mean diagonal of Σ̃_rr
FLIPS = 100  # maximum number of flips per row and half
SMALLEST_HALF = 8  # at most this many remaining columns are rounded together


def round_by_ridges(task: RoundingTask) -> RoundingResult:
    """Round one layer by ERQ; the task must have moments.

    The second regression requires codes of W itself: factors of the corrected weight are rounded to nearest.
    """
    moments = task.moments
    assert moments is not None
    weight = task.fit.weight
    corrected = corrected_fit(task.fit, moments)
    nearest = _stored(task, task.rounded())
    before = output_error(weight, nearest.dense().to(weight.device), moments)
    parts = task.rounded(corrected)
    if not task.form.has_product:
        parts = {
            name: part._replace(codes=round_in_halves(part.values, moments.compressed, part.quantizer))
            if isinstance(part, Rounded)
            else part
            for name, part in parts.items()
        }
    layer = _stored(task, parts)
    after = output_error(weight, layer.dense().to(weight.device), moments)
    return RoundingResult(nearest, before, before) if after > FAR * before else RoundingResult(layer, before, after)


def _stored(task: RoundingTask, parts: Mapping[str, FittedMatrix]) -> CompressedLayer:
    return CompressedLayer.of_rounded(task.layer, task.candidate, parts)


def corrected_fit(fit: HessianFit, moments: InputMoments) -> HessianFit:
    """The fit of ``W* = W + W C (Σ̃ + λ₁I)⁻¹``.

    With one vector per sample, as before a classifier's head, there are few more samples than input features, and W*
    with the published λ₁ would fit noise. There λ₁ on means is at least the mean diagonal of Σ̃ times the number of
    input features per sample.
    """
    count, inputs = max(1, moments.tokens), fit.weight.shape[1]
    ridge = TOKEN_RIDGE / count
    if not moments.has_tokens:
        ridge = max(VECTOR_RIDGE / count, float(diagonal(moments.compressed).mean()) * inputs / count)
    return fit.of(ridge_correction(fit.weight.double(), moments, ridge).float())


def round_in_halves(weight: Tensor, covariance: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Codes of the second regression (Wqer), ``(rows, columns)``, integers in float32.

    Args:
        weight: ``(rows, columns)``.
        covariance: Σ̃, ``(columns, columns)``, or its blocks, each of which is halved by itself.
        quantizer: scales and zero-points of the rows.
    """
    if covariance.dim() == 3:
        blocks = [round_in_halves(weight[:, own], block, quantizer) for own, block in parts(covariance)]
        return torch.cat(blocks, dim=1)
    sigma = covariance.double()
    left = weight.double().clone()
    codes = torch.empty_like(weight, dtype=torch.float32)
    start, columns = 0, weight.shape[1]
    while start < columns:
        count = columns - start
        stop = columns if count <= SMALLEST_HALF else start + count // 2
        part = slice(start, stop)
        codes[:, part] = flipped(left[:, part], sigma[part, part], quantizer)
        if stop < columns:
            delta = quantizer.dequantize(codes[:, part]).double() - left[:, part]
            factor = torch.linalg.cholesky(damped(sigma[stop:, stop:], WEIGHT_RIDGE))
            left[:, stop:] -= torch.cholesky_solve((delta @ sigma[part, stop:]).T, factor).T
        start = stop
    return codes


def flipped(values: Tensor, sigma: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Nearest codes, improved by single flips that reduce ``δ Σ δᵀ`` of each row, the best flip per iteration.

    Args:
        values: ``(rows, columns)`` float64.
        sigma: Σ, ``(columns, columns)`` float64.
        quantizer: scales and zero-points of the rows.

    Returns:
        Codes ``(rows, columns)``, integers in float32.
    """
    codes = quantizer.quantize(values.float())
    scale = quantizer.scale.double().unsqueeze(1)
    delta = quantizer.dequantize(codes).double() - values
    slope = delta @ sigma
    diagonal, top = sigma.diagonal(), 2**quantizer.bits - 1
    rows = torch.arange(len(values), device=values.device)
    for _ in range(FLIPS):
        step = torch.where(delta > 0, -1.0, 1.0).double()  # to the other side of the value
        gain = step * scale * (2 * slope + step * scale * diagonal)
        target = codes + step
        gain = torch.where((target < 0) | (target > top), torch.inf, gain)
        least, column = gain.min(1)
        better = least < 0
        if not better.any():
            break
        move = torch.where(better, step[rows, column], torch.zeros_like(least))
        codes[rows, column] += move.float()
        change = move * scale.squeeze(1)
        delta[rows, column] += change
        slope += change.unsqueeze(1) * sigma[column]
    return codes
