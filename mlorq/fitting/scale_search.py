"""Range search for a matrix's rows: scales and zero-points of least weighted squared error (METHOD 1).

Ranges are given by percentiles of each row. Scales are rounded to what is stored before codes are found, so
that the searched, measured and stored quantizers are identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mlorq.codecs.affine import SCALE_LIMITS, ZERO_POINT_DTYPES, RowQuantizer, scale_dtype, stored_scale
from mlorq.codecs.base import ZeroPoint

INT16_LIMIT = 32767
CHUNK_ELEMENTS = 1 << 22  # entries of one temporary of a search: bounds memory, near the cache's size


def range_quantizer(low: Tensor, high: Tensor, bits: int, zero_point: ZeroPoint) -> RowQuantizer:
    """Quantizers for ranges ``[low, high]`` of any shape: ``s = (hi - lo) / (2^b - 1)``, ``z = round(-lo / s)``.

    If zero-points are codes, the range is extended to contain 0, so that z is a code. Constant rows are extended
    as well (their range would give ``s = 0``), and so are rows whose z would not fit int16. Rows of zeros get
    ``s = 1``, ``z = 0``.
    """
    levels = 2**bits - 1
    as_codes = ZERO_POINT_DTYPES[zero_point] == "uint8"
    constant = high <= low
    if as_codes:
        extend = torch.ones_like(constant)
    else:
        step = ((high - low) / levels).clamp(*SCALE_LIMITS[scale_dtype(zero_point)])
        extend = constant | ((low / step).abs() > INT16_LIMIT - 1)
    low = torch.where(extend, low.clamp(max=0), low)
    high = torch.where(extend, high.clamp(min=0), high)
    scale = stored_scale((high - low) / levels, zero_point)
    empty = (low == 0) & (high == 0)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    zero = (-low / scale).round()
    if as_codes:
        zero = zero.clamp(0, levels)
    return RowQuantizer(scale, zero, bits, zero_point)


def row_ranges(values: Tensor, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Ranges given by the percentile pairs ``(1 - p, p)`` of each row, linearly interpolated.

    Args:
        values: ``(rows, columns)``.
        percentiles: upper percentiles p, in (0.5, 1].

    Returns:
        ``low`` and ``high``, each ``(len(percentiles), rows)`` float32.
    """
    rows, columns = values.shape
    upper = torch.tensor(percentiles, dtype=torch.float64, device=values.device)
    low, high = torch.empty(2, len(percentiles), rows, device=values.device)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        ordered = values[part].to(torch.float32)
        if ordered.is_cpu:  # NumPy sorts with vector instructions, some 20 times as fast
            ordered = torch.from_numpy(np.sort(ordered.detach().numpy(), axis=1))
        else:
            ordered = ordered.sort(dim=1).values
        low[:, part] = _at(ordered, (1 - upper) * (columns - 1))
        high[:, part] = _at(ordered, upper * (columns - 1))
    return low, high


def _at(ordered: Tensor, positions: Tensor) -> Tensor:
    """Values at fractional positions of sorted rows, ``(len(positions), rows)``."""
    below = positions.floor().clamp(0, ordered.shape[1] - 1).long()
    above = positions.ceil().clamp(0, ordered.shape[1] - 1).long()
    fraction = (positions - below).to(ordered.dtype)
    return torch.lerp(ordered[:, below], ordered[:, above], fraction).T


def search_quantizer(
    values: Tensor,
    bits: int,
    percentiles: Sequence[float],
    *,
    weights: Tensor | None = None,
    zero_point: ZeroPoint = "codes",
    ranges: tuple[Tensor, Tensor] | None = None,
) -> RowQuantizer:
    """Quantizers of a matrix's rows: the percentile range of least weighted squared error per row (METHOD 1).

    All rows and percentiles are one batched computation, in chunks of bounded memory.

    Args:
        values: the matrix to quantize, ``(rows, columns)``.
        bits: bit-width of the codes.
        percentiles: upper percentiles p tried.
        weights: ``(rows, columns)`` non-negative weights of the squared errors; None for ones.
        zero_point: range of zero-points (``codecs.base.Storage``).
        ranges: the result of ``row_ranges(values, percentiles)``, to share one sort among bit-widths.

    Returns:
        One scale and zero-point per row; the widest range wins ties, so that all-zero weights clip nothing.
    """
    values = values.to(torch.float32)
    low, high = ranges if ranges is not None else row_ranges(values, percentiles)
    candidates = range_quantizer(low, high, bits, zero_point)
    rows, columns = values.shape
    errors = values.new_empty(low.shape)
    step = max(1, CHUNK_ELEMENTS // (low.shape[0] * columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        chunk = RowQuantizer(candidates.scale[:, part], candidates.zero_point[:, part], bits)
        squared = chunk.round_trip(values[part]).sub_(values[part]).square_()
        errors[:, part] = (squared if weights is None else squared.mul_(weights[part])).sum(-1)
    return _least(candidates, errors)


def search_left_factor(
    factor: Tensor,
    right: Tensor,
    target: Tensor,
    bits: int,
    percentiles: Sequence[float],
    *,
    weights: Tensor,
    zero_point: ZeroPoint = "codes",
) -> RowQuantizer:
    """Quantizers of a left factor's rows by the error after multiplication by B (METHOD 1).

    The error of row i is ``Σ_j H_ij (W_ij - (Â_i B)_j)²``.

    Args:
        factor: A, ``(out_features, rank)``.
        right: B, ``(rank, in_features)``.
        target: W, ``(out_features, in_features)``.
        bits: bit-width of the codes of A.
        percentiles: upper percentiles p tried.
        weights: H, ``(out_features, in_features)``.
        zero_point: range of zero-points (``codecs.base.Storage``).
    """
    factor, right, target = (tensor.to(torch.float32) for tensor in (factor, right, target))
    low, high = row_ranges(factor, percentiles)
    candidates = range_quantizer(low, high, bits, zero_point)
    errors = factor.new_empty(low.shape)
    step = max(1, CHUNK_ELEMENTS // target.shape[1])
    for index in range(low.shape[0]):
        for start in range(0, factor.shape[0], step):
            part = slice(start, start + step)
            chunk = RowQuantizer(candidates.scale[index, part], candidates.zero_point[index, part], bits)
            product = chunk.round_trip(factor[part]) @ right
            errors[index, part] = product.sub_(target[part]).square_().mul_(weights[part]).sum(-1)
    return _least(candidates, errors)


def _least(candidates: RowQuantizer, errors: Tensor) -> RowQuantizer:
    # Percentiles are sorted, the widest range last: flip them, so that argmin's first minimum is the widest.
    best = errors.shape[0] - 1 - errors.flip(0).argmin(dim=0)
    rows = torch.arange(errors.shape[1], device=errors.device)
    return replace(candidates, scale=candidates.scale[best, rows], zero_point=candidates.zero_point[best, rows])
