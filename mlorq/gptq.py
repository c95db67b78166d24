"""Closed-form rounding of rows under a shared Hessian: GPTQ, and coordinate descent from there (METHOD 7).

For rows w with scales of their own and one H, both lower ``(ŵ - w) H (ŵ - w)ᵀ`` over the codes. GPTQ (arXiv 2210.17323)
rounds column after column and moves the error of each into those not rounded yet. Coordinate descent then goes round
the columns again: each code is set to the best one given all the others, so the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlorq.quantizers import SMALLEST_SCALE, RowQuantizer

DAMPING = 0.01  # of the mean diagonal of H
BLOCK = 64  # columns between updates of all others


def gptq(weight: Tensor, hessian: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Codes by GPTQ, columns of the largest diagonal of H first.

    Args:
        weight: ``(rows, columns)``.
        hessian: H, ``(columns, columns)``, positive semi-definite.
        quantizer: scales and zero-points of the rows.

    Returns:
        ``(rows, columns)`` float32 whole numbers.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian.double()[order][:, order]
    h = h + DAMPING * h.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny) * torch.eye(
        len(h), dtype=torch.float64, device=h.device
    )
    # The rows of the upper factor of H⁻¹ say how the error of a column is shared among those after it.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    left = weight.float()[:, order].clone()
    codes = torch.empty_like(left)
    scale, zero, top = quantizer.scale, quantizer.zero_point, 2**quantizer.bits - 1
    columns = left.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            code = (left[:, column] / scale).round_().add_(zero).clamp_(0, top)
            codes[:, column] = code
            error = (left[:, column] - (code - zero) * scale) / upper[column, column]
            left[:, column + 1 : stop].addr_(error, upper[column, column + 1 : stop], alpha=-1)
            errors[:, column - start] = error
        left[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def descend(weight: Tensor, hessian: Tensor, quantizer: RowQuantizer, codes: Tensor, sweeps: int = 1) -> Tensor:
    """Codes after cyclic coordinate descent from ``codes``; shapes as for ``gptq``."""
    h = hessian.float()
    scale, zero, top = quantizer.scale, quantizer.zero_point, 2**quantizer.bits - 1
    codes = codes.clone()
    diagonal = h.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    columns = codes.shape[1]
    for _ in range(sweeps):
        slope = (quantizer.dequantize(codes) - weight.float()) @ h  # half the gradient
        changed = False
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            own = slope[:, start:stop]
            block = h[start:stop, start:stop]
            moves = torch.zeros_like(own)
            for index, column in enumerate(range(start, stop)):
                old = codes[:, column]
                best = (old - zero - own[:, index] / (diagonal[column] * scale)).round_().add_(zero).clamp_(0, top)
                move = (best - old) * scale
                codes[:, column] = best
                moves[:, index] = move
                own = own.addr(move, block[index])
            slope.addmm_(moves, h[start:stop])
            changed = changed or bool(moves.any())
        if not changed:
            break
    return codes


def refit_scale(weight: Tensor, hessian: Tensor, quantizer: RowQuantizer, codes: Tensor) -> RowQuantizer:
    """The scales that fit given codes best, as float16 values: ``(q H wᵀ) / (q H qᵀ)`` a row, q less zero-point.

    Rows where that is not positive keep theirs, and so do rows that float16 has no scale for.
    """
    centred = (codes - quantizer.zero_point.unsqueeze(1)).double()
    weighted = centred @ hessian.double()
    power = (weighted * centred).sum(1)
    best = (weighted * weight.double()).sum(1) / power.clamp(min=torch.finfo(torch.float64).tiny)
    stored = best.to(torch.float16).float()
    usable = (power > 0) & torch.isfinite(stored) & (stored >= SMALLEST_SCALE)
    return RowQuantizer(torch.where(usable, stored, quantizer.scale), quantizer.zero_point, quantizer.bits)


def row_errors(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """``(ŵ - w) H (ŵ - w)ᵀ`` of every row, ``(rows,)`` float64."""
    error = rounded.double() - weight.double()
    return ((error @ hessian.double()) * error).sum(1)
