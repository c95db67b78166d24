"""Closed-form rounding of rows under a shared Hessian: GPTQ, and coordinate descent from there (METHOD 7).

For rows w with scales of their own and one H, both lower ``(ŵ - w) H (ŵ - w)ᵀ`` over the codes. GPTQ (arXiv 2210.17323)
rounds column after column and moves the error of each into those not rounded yet. Coordinate descent then goes round
the columns again: each code is set to the best one given all the others, so the error never rises.

Both keep the columns as rows of what they work on: a column of many rows is then one stretch of memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from mlorq.codecs.affine import SMALLEST_SCALE, RowQuantizer
from mlorq.fitting.cuda import has_kernels

DAMPING = 0.01  # of the mean diagonal of H
BLOCK = 64  # columns between updates of all others


class RowHessian:
    """H, ``(columns, columns)``, positive semi-definite, with what rounding needs of it, computed once for all rows."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()

    @cached_property
    def single(self) -> Tensor:
        """H in float32."""
        return self.matrix.float()

    @cached_property
    def order(self) -> Tensor:
        """The order in which GPTQ takes the columns: the largest diagonal first."""
        return self.matrix.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def shares(self) -> Tensor:
        """The upper factor of H⁻¹ in that order, float32: how a column's error is shared among those after it."""
        h = self.matrix[self.order][:, self.order]
        h = h + DAMPING * h.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny) * torch.eye(
            len(h), dtype=torch.float64, device=h.device
        )
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor.float()

    def norms(self, rows: Tensor) -> Tensor:
        """``w H wᵀ`` of every row, ``(rows,)`` float64."""
        wide = rows.double()
        return ((wide @ self.matrix) * wide).sum(1)


def gptq(weight: Tensor, hessian: RowHessian, quantizer: RowQuantizer) -> Tensor:
    """Codes by GPTQ.

    Args:
        weight: ``(rows, columns)``.
        hessian: H of all rows.
        quantizer: scales and zero-points of the rows.

    Returns:
        ``(rows, columns)`` float32 whole numbers.
    """
    order, upper = hessian.order, hessian.shares
    left = weight.float().T[order].contiguous()
    codes = torch.empty_like(left)
    scale, zero, top = quantizer.scale, quantizer.zero_point, 2**quantizer.bits - 1
    columns = len(left)
    block, _ = _block_functions(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(left[start:stop])
        block(left[start:stop], upper[start:stop, start:stop], scale, zero, top, codes[start:stop], errors)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def gptq_block(
    left: Tensor, shares: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, errors: Tensor
) -> None:
    """Round the columns of one block.

    Args:
        left: ``(columns, rows)``, what is left of the values to round; spent.
        shares: ``(columns, columns)``, upper triangular: how errors are shared.
        scale, zero: of the rows, ``(rows,)``.
        top: the largest code.
        codes, errors: ``(columns, rows)``, written: codes, and errors over pivots.
    """
    pivots = shares.diagonal().tolist()
    for column, values in enumerate(left):
        code = (values / scale).round_().add_(zero).clamp_(0, top)
        codes[column] = code
        error = errors[column]
        torch.sub(values, code.sub_(zero).mul_(scale), out=error).div_(pivots[column])
        left[column + 1 :].addr_(shares[column, column + 1 :], error, alpha=-1)


def descend(weight: Tensor, hessian: RowHessian, quantizer: RowQuantizer, codes: Tensor, sweeps: int = 1) -> Tensor:
    """Codes after cyclic coordinate descent from ``codes``; shapes as for ``gptq``."""
    h = hessian.single
    scale, zero, top = quantizer.scale, quantizer.zero_point, 2**quantizer.bits - 1
    found = codes.T.contiguous()
    columns = len(found)
    _, block = _block_functions(found)
    for _ in range(sweeps):
        slope = h @ (quantizer.dequantize(found.T) - weight.float()).T  # half the gradient
        changed = torch.zeros((), dtype=torch.bool, device=h.device)
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            moves = torch.empty_like(slope[start:stop])
            block(slope[start:stop], h[start:stop, start:stop], scale, zero, top, found[start:stop], moves)
            slope[stop:].addmm_(h[stop:, start:stop], moves)
            changed |= moves.any()
        if sweeps > 1 and not changed:
            break
    return found.T.contiguous()


def descend_block(
    slope: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, moves: Tensor
) -> None:
    """Set the codes of one block's columns, one column after another, to the best ones given all the others.

    Args:
        slope: ``(columns, rows)``, half the gradient by the values; spent.
        hessian: ``(columns, columns)`` of the block.
        scale, zero: of the rows, ``(rows,)``.
        top: the largest code.
        codes: ``(columns, rows)``, changed.
        moves: ``(columns, rows)``, written: by how much values changed.
    """
    diagonal = hessian.diagonal().clamp(min=torch.finfo(torch.float32).tiny).tolist()
    for column, own in enumerate(slope):
        old = codes[column]
        best = (old - zero - own / (scale * diagonal[column])).round_().add_(zero).clamp_(0, top)
        torch.sub(best, old, out=moves[column]).mul_(scale)
        codes[column] = best
        # What this column does to those before it shows in the next sweep's slope.
        slope[column + 1 :].addr_(hessian[column, column + 1 :], moves[column])


def _block_functions(values: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """``gptq_block`` and ``descend_block`` for where the values are."""
    if not has_kernels(values.device):
        return gptq_block, descend_block
    kernels = importlib.import_module("mlorq.fitting.gptq_kernels")
    return kernels.gptq_block, kernels.descend_block


def refit_scale(
    weight: Tensor, hessian: RowHessian, quantizer: RowQuantizer, codes: Tensor, norms: Tensor | None = None
) -> tuple[RowQuantizer, Tensor]:
    """The scales that fit given codes best, and the rows' errors with them.

    The error of a row is a parabola in its scale with its least value at ``(q H wᵀ) / (q H qᵀ)``, q the codes less the
    zero-point, so that of all float16 values the nearest one is best: never worse than the scale given. Rows where that
    is not positive keep theirs, and so do rows that float16 has no scale for.

    Args:
        weight, hessian, quantizer, codes: as for ``gptq``.
        norms: ``w H wᵀ`` of the rows, where they are known.

    Returns:
        The quantizer, and ``(ŵ - w) H (ŵ - w)ᵀ`` of every row, ``(rows,)`` float64.
    """
    centred = (codes - quantizer.zero_point.unsqueeze(1)).double()
    weighted = centred @ hessian.matrix
    power = (weighted * centred).sum(1)
    cross = (weighted * weight.double()).sum(1)
    stored = (cross / power.clamp(min=torch.finfo(torch.float64).tiny)).to(torch.float16).float()
    usable = (power > 0) & torch.isfinite(stored) & (stored >= SMALLEST_SCALE)
    scale = torch.where(usable, stored, quantizer.scale)
    wide = scale.double()
    errors = (hessian.norms(weight) if norms is None else norms) + wide * (wide * power - 2 * cross)
    return replace(quantizer, scale=scale), errors
