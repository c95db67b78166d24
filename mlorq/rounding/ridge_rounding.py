"""ERQ: two ridge regressions around the rounding of a layer (arXiv 2407.06794; METHOD 8).

1. Activation error (Aqer): weights move to where they make up for quantized inputs,
   ``W* = W + W C (Σ̃ + λ₁I)⁻¹``, a ridge on the change; ``error_feedback`` has the formula and chooses λ, here it is
   the published one, on sums over tokens.
2. Weight error (Wqer): columns are rounded in turns, half of those that are left at a time. Codes of a half are refined
   by flips of single codes that lower the proxy error ``δ Σ̃_ss δᵀ`` of their row; what is left of it goes into the
   columns that are not rounded yet, by ridge: ``w_r ← w_r - δ Σ̃_sr (Σ̃_rr + λ₂I)⁻¹``.

A flip moves a code to the other one next to its value. The published code flips where the gradient's sign says so; here
the flip of each row that lowers its error most is made, one a turn, until none does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlorq.codecs.affine import Rounded, RowQuantizer
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.forms.base import FORMS
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.rounding.base import RoundingResult, RoundingTask
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments

TOKEN_RIDGE, VECTOR_RIDGE = 2000.0, 0.1  # λ₁ on sums: of inputs with tokens, and of one vector a sample
WEIGHT_RIDGE = 1e-2  # λ₂, times the mean diagonal of what is inverted
FLIPS = 100  # most of a row and half
SMALLEST_HALF = 8  # columns: fewer are rounded together


def round_by_ridges(task: RoundingTask) -> RoundingResult:
    """Round one layer by ERQ; the task has moments.

    The second regression needs codes of W itself: forms with factors get nearest rounding of the moved weight's.
    """
    moments = task.moments
    assert moments is not None
    weight = task.fit.weight
    moved = moved_fit(task.fit, moments)
    before = output_error(weight, _stored(task, task.rounded()).dense().to(weight.device), moments)
    parts = task.rounded(moved)
    if not FORMS[task.candidate.form].has_product:
        parts = {
            name: part._replace(codes=round_in_halves(part.values, moments.compressed, part.quantizer))
            for name, part in parts.items()
        }
    layer = _stored(task, parts)
    after = output_error(weight, layer.dense().to(weight.device), moments)
    return RoundingResult(layer, before, after)


def _stored(task: RoundingTask, parts: Mapping[str, Rounded]) -> CompressedLayer:
    return CompressedLayer.of_rounded(task.layer, task.candidate, parts)


def moved_fit(fit: HessianFit, moments: InputMoments) -> HessianFit:
    """The fit of ``W* = W + W C (Σ̃ + λ₁I)⁻¹``.

    Of one vector per sample, as before a classifier's head, there are seldom many more than inputs, and with the
    published λ₁ W* fits their noise: there λ₁ is at least the mean of Σ̃'s diagonal times inputs per sample.
    """
    count, inputs = max(1, moments.tokens), fit.weight.shape[1]
    ridge = TOKEN_RIDGE / count
    if not moments.has_tokens:
        ridge = max(VECTOR_RIDGE / count, float(moments.compressed.diagonal().mean()) * inputs / count)
    identity = torch.eye(fit.weight.shape[1], dtype=torch.float64, device=fit.weight.device)
    factor = torch.linalg.cholesky(moments.compressed + ridge * identity)
    w = fit.weight.double()
    moved = w + torch.cholesky_solve((w @ moments.drift_cross).T, factor).T
    return fit.of(moved.float())


def round_in_halves(weight: Tensor, covariance: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Codes ``(rows, columns)``, float32 whole numbers, of the second regression.

    Args:
        weight: ``(rows, columns)``.
        covariance: Σ̃, ``(columns, columns)``.
        quantizer: of the rows.
    """
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
            rest = sigma[stop:, stop:]
            ridge = WEIGHT_RIDGE * rest.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
            factor = torch.linalg.cholesky(rest + ridge * torch.eye(len(rest), dtype=rest.dtype, device=rest.device))
            left[:, stop:] -= torch.cholesky_solve((delta @ sigma[part, stop:]).T, factor).T
        start = stop
    return codes


def flipped(values: Tensor, sigma: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Nearest codes, then single flips that lower ``δ Σ δᵀ`` of each row, the best one a turn.

    Args:
        values: ``(rows, columns)`` float64.
        sigma: ``(columns, columns)``.
        quantizer: of the rows.
    """
    codes = quantizer.quantize(values.float())
    scale = quantizer.scale.double().unsqueeze(1)
    delta = quantizer.dequantize(codes).double() - values
    slope = delta @ sigma
    diagonal, top = sigma.diagonal(), 2**quantizer.bits - 1
    rows = torch.arange(len(values), device=values.device)
    for _ in range(FLIPS):
        step = torch.where(delta > 0, -1.0, 1.0).double()  # towards the other side of the value
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
