"""Rounding of rows under a shared Hessian: GPTQ, then cyclic coordinate descent (METHOD 7).

For rows w with one scale per row and one H, both reduce ``(ŵ - w) H (ŵ - w)ᵀ`` over the codes. GPTQ (arXiv 2210.17323)
rounds the columns in turn and compensates the error of each in the columns not yet rounded. Coordinate descent then
sweeps the columns: each code is set to its optimum given all the others, so the error never rises.

Both work on transposed matrices, so that a column of many rows is contiguous in memory. Blocks of columns are compiled
loops (``_columns.c``), Triton kernels on CUDA (``gptq_kernels``), or the functions of this file, one operation of torch
a column, where there is neither. They round differently in the last digit, and so may take another code at a tie.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

import torch
from torch import Tensor

from mlorq.calibration.blocks import multiply, parts
from mlorq.codecs.affine import SCALE_LIMITS, RowQuantizer, scale_dtype, stored_scale
from mlorq.fitting.cuda import has_kernels
from mlorq.fitting.gram import damped

DAMPING = 0.01  # added to the diagonal of H, relative to its mean
BLOCK = 64  # columns per block; the columns after a block are updated once


class RowHessian:
    """A positive semi-definite H, ``(columns, columns)``, with its factor for rounding, computed once for all rows.

    Of blocks on the diagonal (``mlorq.calibration.blocks``) each is a problem by itself, which is exact: errors do not
    spread to other blocks.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()

    @cached_property
    def single(self) -> Tensor:
        """H in float32."""
        return self.matrix.float()

    @cached_property
    def order(self) -> Tensor:
        """Column order of GPTQ: descending diagonal of H, within each block."""
        found = self.matrix.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        if found.dim() == 1:
            return found
        starts = torch.arange(len(found), device=found.device) * found.shape[1]
        return (found + starts.unsqueeze(1)).flatten()

    @cached_property
    def shares(self) -> Tensor:
        """Upper Cholesky factor of the damped H⁻¹ in that order, float32: spreads a column's error over later ones."""
        h = damped(self.in_order(self.matrix), DAMPING)
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor.float()

    def in_order(self, matrix: Tensor) -> Tensor:
        """H, or a matrix of its shape, with rows and columns in the order of ``order``."""
        if matrix.dim() == 2:
            order = self.order.to(matrix.device)
            return matrix[order][:, order]
        order = (self.order.reshape(len(matrix), -1) % matrix.shape[-1]).to(matrix.device)
        return torch.stack([block[own][:, own] for block, own in zip(matrix, order, strict=True)])

    def norms(self, rows: Tensor) -> Tensor:
        """``w H wᵀ`` per row, ``(rows,)`` float64."""
        wide = rows.double()
        return (multiply(wide, self.matrix) * wide).sum(1)


def gptq(weight: Tensor, hessian: RowHessian, quantizer: RowQuantizer) -> Tensor:
    """Codes of a matrix by GPTQ (arXiv 2210.17323).

    Args:
        weight: ``(rows, columns)``.
        hessian: H, shared by all rows.
        quantizer: scales and zero-points of the rows.

    Returns:
        Codes, ``(rows, columns)`` float32 integers.
    """
    order = hessian.order
    ordered = weight.float().T[order].contiguous()
    codes = torch.empty_like(ordered)
    scale, zero, top = quantizer.scale, quantizer.zero_point, 2**quantizer.bits - 1
    block, _ = _block_functions(ordered)
    for part, upper in parts(hessian.shares):
        left, found = ordered[part], codes[part]
        columns = len(left)
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            errors = torch.empty_like(left[start:stop])
            block(left[start:stop], upper[start:stop, start:stop], scale, zero, top, found[start:stop], errors)
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def gptq_block(
    left: Tensor, shares: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, errors: Tensor
) -> None:
    """Round the columns of one block.

    Args:
        left: ``(columns, rows)``, the values to round, compensated for earlier columns; overwritten.
        shares: ``(columns, columns)``, the block of ``RowHessian.shares``, upper triangular.
        scale, zero: scales and zero-points, ``(rows,)``.
        top: the largest code.
        codes, errors: ``(columns, rows)``, written: codes, and errors divided by pivots.
    """
    pivots = shares.diagonal().tolist()
    for column, values in enumerate(left):
        code = (values / scale).round_().add_(zero).clamp_(0, top)
        codes[column] = code
        error = errors[column]
        torch.sub(values, code.sub_(zero).mul_(scale), out=error).div_(pivots[column])
        left[column + 1 :].addr_(shares[column, column + 1 :], error, alpha=-1)


def descend(weight: Tensor, hessian: RowHessian, quantizer: RowQuantizer, codes: Tensor, sweeps: int = 1) -> Tensor:
    """Codes after at most ``sweeps`` of cyclic coordinate descent from ``codes``; shapes as for ``gptq``."""
    scale, zero, top = quantizer.scale, quantizer.zero_point, 2**quantizer.bits - 1
    codes = codes.T.contiguous()
    _, block = _block_functions(codes)
    for part, h in parts(hessian.single):
        found = codes[part]
        columns = len(found)
        for _ in range(sweeps):
            errors = quantizer.dequantize(found.T) - weight[:, part].float()
            slope = h @ errors.T  # half the gradient
            changed = torch.zeros((), dtype=torch.bool, device=h.device)
            for start in range(0, columns, BLOCK):
                stop = min(start + BLOCK, columns)
                moves = torch.empty_like(slope[start:stop])
                block(slope[start:stop], h[start:stop, start:stop], scale, zero, top, found[start:stop], moves)
                slope[stop:].addmm_(h[stop:, start:stop], moves)
                changed |= moves.any()
            if sweeps > 1 and not changed:
                break
    return codes.T.contiguous()


def descend_block(
    slope: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, moves: Tensor
) -> None:
    """Set the codes of one block's columns, one column after another, to the best ones given all the others.

    Args:
        slope: ``(columns, rows)``, half the gradient with respect to the values; overwritten.
        hessian: ``(columns, columns)`` of the block.
        scale, zero: scales and zero-points, ``(rows,)``.
        top: the largest code.
        codes: ``(columns, rows)``, updated in place.
        moves: ``(columns, rows)``, written: changes of the values.
    """
    diagonal = hessian.diagonal().clamp(min=torch.finfo(torch.float32).tiny).tolist()
    for column, own in enumerate(slope):
        old = codes[column]
        best = (old - zero - own / (scale * diagonal[column])).round_().add_(zero).clamp_(0, top)
        torch.sub(best, old, out=moves[column]).mul_(scale)
        codes[column] = best
        # The effect on earlier columns enters the next sweep's slope.
        slope[column + 1 :].addr_(hessian[column, column + 1 :], moves[column])


def _block_functions(values: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """``gptq_block`` and ``descend_block`` for the values' device: Triton kernels or compiled loops if available."""
    if has_kernels(values.device):
        kernels = importlib.import_module("mlorq.fitting.gptq_kernels")
        return kernels.gptq_block, kernels.descend_block
    compiled = _compiled() if values.device.type == "cpu" else None
    return compiled or (gptq_block, descend_block)


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """The compiled loops, for tensors; None where the package was installed without them."""
    try:
        module = importlib.import_module("mlorq.fitting._columns")
    except ImportError:
        return None
    return _with_arrays(module.gptq_block), _with_arrays(module.descend_block)


def _with_arrays(block: Callable[..., None]) -> Callable[..., None]:
    """A compiled loop, which takes arrays, as a function of tensors."""

    def on_tensors(
        values: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, results: Tensor
    ) -> None:
        read = [one.detach().contiguous().numpy() for one in (values, matrix, scale, zero)]
        block(*read, top, codes.numpy(), results.numpy())

    return on_tensors


def refit_scale(
    weight: Tensor, hessian: RowHessian, quantizer: RowQuantizer, codes: Tensor, norms: Tensor | None = None
) -> tuple[RowQuantizer, Tensor]:
    """Least-squares scales for given codes, and the rows' errors with them.

    The error of a row is quadratic in its scale with its minimum at ``(q H wᵀ) / (q H qᵀ)``, q the codes minus the
    zero-point, so that the nearest value that can be stored is optimal, and never worse than the given scale. Rows
    keep their scale if the minimum is not positive or outside the range of stored scales.

    Args:
        weight, hessian, quantizer, codes: as for ``gptq``.
        norms: ``w H wᵀ`` per row, if already known.

    Returns:
        The quantizer, and ``(ŵ - w) H (ŵ - w)ᵀ`` per row, ``(rows,)`` float64.
    """
    centred = (codes - quantizer.zero_point.unsqueeze(1)).double()
    weighted = multiply(centred, hessian.matrix)
    power = (weighted * centred).sum(1)
    cross = (weighted * weight.double()).sum(1)
    best = cross / power.clamp(min=torch.finfo(torch.float64).tiny)
    low, high = SCALE_LIMITS[scale_dtype(quantizer.stored_as)]
    usable = (power > 0) & (best >= low / 2) & (best <= high)
    scale = torch.where(usable, stored_scale(best, quantizer.stored_as), quantizer.scale)
    wide = scale.double()
    errors = (hessian.norms(weight) if norms is None else norms) + wide * (wide * power - 2 * cross)
    return replace(quantizer, scale=scale), errors
