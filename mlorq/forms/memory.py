"""What a candidate costs in bytes (METHOD 2).

Two ways to count. ``exact`` (default) is what the packed checkpoint really holds for the layer: codes packed
row by row to whole bytes, a float16 scale and a zero-point per row. ``paper`` (arXiv 2507.09616) is the codes'
bits alone, ``m n b`` or ``r (m bA + n bB)``, rounded up to a byte. Biases belong to neither: they are part of
the rest.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlorq.codecs.affine import ZeroPoint
from mlorq.forms.base import MATRICES, Candidate

Accounting = Literal["exact", "paper"]
Count = TypeVar("Count", int, NDArray[np.int64])

SCALE_BYTES = 2  # float16
ZERO_POINT_BYTES: dict[ZeroPoint, int] = {"codes": 1, "int16": 2}
FLOAT_BYTES = 4  # float32


def matrix_bytes(rows: Count, columns: Count, bits: int, zero_point: ZeroPoint) -> Count:
    """Bytes of one stored matrix, ``rows (ceil(columns bits / 8) + 2 + z)``, z = 1 (codes) or 2 (int16).

    Args:
        rows: rows of the matrix, an int or an int64 array.
        columns: columns of the matrix, likewise; arrays broadcast.
        bits: code width.
        zero_point: how zero-points are stored.
    """
    return rows * ((columns * bits + 7) // 8 + (SCALE_BYTES + ZERO_POINT_BYTES[zero_point]))


def stored_matrices(candidate: Candidate, out_features: int, in_features: int) -> dict[str, tuple[int, int, int]]:
    """``{name: (rows, columns, bits)}`` of the matrices that a candidate stores.

    ``weight`` is ``(out_features, in_features)``, ``a`` ``(out_features, rank)`` and ``b`` ``(rank, in_features)``.

    Raises:
        ValueError: the candidate lacks a field that its form needs or has one of another, or the form is unknown.
    """
    bits, bits_a, bits_b, rank = candidate.bits, candidate.bits_a, candidate.bits_b, candidate.rank
    found: dict[str, tuple[int, int, int]] = {}
    if bits is not None:
        found["weight"] = (out_features, in_features, bits)
    if bits_a is not None and bits_b is not None and rank is not None:
        found |= {"a": (out_features, rank, bits_a), "b": (rank, in_features, bits_b)}
    if found and tuple(found) == MATRICES.get(candidate.form):
        return found
    raise ValueError(f"incomplete candidate {candidate}")


def candidate_bytes(
    candidate: Candidate, out_features: int, in_features: int, accounting: Accounting, zero_point: ZeroPoint
) -> int:
    """Bytes of one candidate of a layer with the weight matrix ``(out_features, in_features)`` (METHOD 2).

    For a grouped convolution ``in_features`` is ``in_channels / groups * kh * kw``.
    """
    matrices = stored_matrices(candidate, out_features, in_features).values()
    if accounting == "paper":
        return (sum(rows * columns * bits for rows, columns, bits in matrices) + 7) // 8
    return sum(matrix_bytes(rows, columns, bits, zero_point) for rows, columns, bits in matrices)


def low_rank_bytes(
    ranks: NDArray[np.int64],
    bits_a: int,
    bits_b: int,
    out_features: int,
    in_features: int,
    accounting: Accounting,
    zero_point: ZeroPoint,
) -> NDArray[np.int64]:
    """``candidate_bytes`` of ``LR(r, bits_a, bits_b)`` for an array of ranks, int64 of the same shape."""
    ranks = np.asarray(ranks, dtype=np.int64)
    if accounting == "paper":
        return (ranks * (out_features * bits_a + in_features * bits_b) + 7) // 8
    rows = np.full_like(ranks, out_features)
    columns = np.full_like(ranks, in_features)
    return matrix_bytes(rows, ranks, bits_a, zero_point) + matrix_bytes(ranks, columns, bits_b, zero_point)
