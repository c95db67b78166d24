"""The inner loops of ``mlorq.fitting.gptq`` as Triton kernels, for CUDA.

A column can only be rounded after the columns before it, so that without these kernels a GPU launches several small
ones per column. Rows are independent: here each program takes ``ROWS`` rows through all columns of a block. Arguments,
results and the order of operations match the functions of the same names in ``mlorq.fitting.gptq``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # per program
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to integers, halves to even


@triton.jit
def _round(values):  # type: ignore[no-untyped-def]
    return (values + MAGIC) - MAGIC


@triton.jit
def _gptq(  # type: ignore[no-untyped-def]
    values, shares, scale, zero, top, codes, errors, width, rows, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    column = tl.arange(0, WIDTH)
    inside, within = row < rows, column < width
    left = tl.load(values + column[:, None] * rows + row[None, :], mask=within[:, None] & inside[None, :], other=0.0)
    scales = tl.load(scale + row, mask=inside, other=1.0)
    zeros = tl.load(zero + row, mask=inside, other=0.0)
    for index in range(width):
        here = (column == index)[:, None]
        value = tl.sum(tl.where(here, left, 0.0), axis=0)
        code = tl.minimum(tl.maximum(_round(tl.div_rn(value, scales)) + zeros, 0.0), top)
        share = tl.load(shares + index * width + column, mask=within, other=0.0)
        pivot = tl.load(shares + index * width + index)
        error = tl.div_rn(value - (code - zeros) * scales, pivot)
        tl.store(codes + index * rows + row, code, mask=inside)
        tl.store(errors + index * rows + row, error, mask=inside)
        left -= share[:, None] * error[None, :]


@triton.jit
def _descend(  # type: ignore[no-untyped-def]
    slope, hessian, scale, zero, top, codes, moves, width, rows, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    column = tl.arange(0, WIDTH)
    inside, within = row < rows, column < width
    slopes = tl.load(slope + column[:, None] * rows + row[None, :], mask=within[:, None] & inside[None, :], other=0.0)
    scales = tl.load(scale + row, mask=inside, other=1.0)
    zeros = tl.load(zero + row, mask=inside, other=0.0)
    for index in range(width):
        here = (column == index)[:, None]
        own = tl.sum(tl.where(here, slopes, 0.0), axis=0)
        old = tl.load(codes + index * rows + row, mask=inside, other=0.0)
        around = tl.load(hessian + index * width + column, mask=within, other=0.0)
        diagonal = tl.maximum(tl.load(hessian + index * width + index), TINY)
        best = _round(old - zeros - tl.div_rn(own, scales * diagonal)) + zeros
        best = tl.minimum(tl.maximum(best, 0.0), top)
        move = (best - old) * scales
        tl.store(codes + index * rows + row, best, mask=inside)
        tl.store(moves + index * rows + row, move, mask=inside)
        slopes += around[:, None] * move[None, :]


def gptq_block(
    left: Tensor, shares: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, errors: Tensor
) -> None:
    """As ``mlorq.fitting.gptq.gptq_block``; ``left`` is not changed."""
    _launch(_gptq, left, shares, scale, zero, top, codes, errors)


def descend_block(
    slope: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, moves: Tensor
) -> None:
    """As ``mlorq.fitting.gptq.descend_block``; ``slope`` is not changed."""
    _launch(_descend, slope, hessian, scale, zero, top, codes, moves)


def _launch(
    kernel: Any, values: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor, top: int, codes: Tensor, result: Tensor
) -> None:
    width, rows = values.shape
    parts = [values.contiguous(), matrix.contiguous(), scale.contiguous(), zero.contiguous(), float(top), codes, result]
    with torch.cuda.device_of(values):
        kernel[(triton.cdiv(rows, ROWS),)](*parts, width, rows, WIDTH=triton.next_power_of_2(width), LANES=ROWS)
