"""What a candidate costs and what a budget allows, in bytes (METHOD 2).

Two ways to count. ``exact`` (default) is what the packed checkpoint really holds for the layer: codes packed
row by row to whole bytes, a float16 scale and a zero-point a row. ``paper`` (arXiv 2507.09616) is the codes'
bits alone, ``m n b`` or ``r (m bA + n bB)``, rounded up to a byte. Biases belong to neither: they are part of
the rest.

A budget is written as average bits a weight (``3bit``), as a share of the float32 size of the compressible
layers (``12.5%``), or as the size of the whole checkpoint (``25MB``, ``25MiB``). Each becomes the bytes
that the compressible layers may take, in exact rational arithmetic, always rounded down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlorq.codecs.affine import ZeroPoint
from mlorq.errors import BudgetError
from mlorq.forms.base import MATRICES, Candidate

Accounting = Literal["exact", "paper"]
BudgetKind = Literal["bits", "percent", "bytes"]
Count = TypeVar("Count", int, NDArray[np.int64])

SCALE_BYTES = 2  # float16
ZERO_POINT_BYTES: dict[ZeroPoint, int] = {"codes": 1, "int16": 2}
FLOAT_BYTES = 4  # budgets in percent are shares of the float32 size, whatever dtype the model runs in

UNITS = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "kb": 10**3,
    "MB": 10**6, "mb": 10**6,
    "GB": 10**9, "gb": 10**9,
    "kiB": 2**10, "KiB": 2**10, "kib": 2**10,
    "MiB": 2**20, "mib": 2**20,
    "GiB": 2**30, "gib": 2**30,
}  # fmt: skip

_BUDGET = re.compile(r"\s*(?P<sign>[+-]?)(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]+|%)\s*", re.ASCII)
_EXPECTED = "expected bits a weight (3bit), a share (12.5%) or a size (25MB, 25MiB, 800kB, 123456B)"


# -- candidates --------------------------------------------------------------------------------------------


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


# -- budgets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """A memory budget as it was asked for.

    Attributes:
        kind: ``bits`` and ``percent`` bound the compressible layers, ``bytes`` the whole checkpoint.
        value: average bits a weight; percent of the float32 size; bytes. A ``Fraction``, so that no budget is
            off by a byte because of binary floating point.
        text: the words of the user.
    """

    kind: BudgetKind
    value: Fraction
    text: str

    def compressible_bytes(self, compressible_params: int, rest_bytes: int) -> int:
        """Bytes that the compressible layers' weights may take together.

        Args:
            compressible_params: weights of the compressible layers (shared weights once, biases not at all).
            rest_bytes: bytes of everything else in the checkpoint, file headers included
                (``mlorq.checkpoint.format.rest_upper_bound``); only sizes of the whole checkpoint look at it.

        Raises:
            BudgetError: the rest alone is larger than the budget.
        """
        if self.kind == "bits":
            return int(self.value * compressible_params // 8)
        if self.kind == "percent":
            return int(self.value * FLOAT_BYTES * compressible_params // 100)
        allowed = int(self.value // 1) - rest_bytes
        if allowed < 0:
            raise BudgetError(
                f"budget {self.text}: the whole checkpoint cannot be that small: what is not compressed "
                f"and the file headers take {rest_bytes} bytes alone; ask for more than {rest_bytes}B"
            )
        return allowed


def parse_budget(text: str) -> Budget:
    """Read a budget: ``3bit``, ``2.5 bits``, ``12.5%``, ``25MB`` (10⁶), ``25MiB`` (2²⁰), ``800kB``, ``9B``.

    Raises:
        BudgetError: it is none of these, not positive, or more than the float32 model.
    """
    match = _BUDGET.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(f"budget {text!r}: {_EXPECTED}")
    value, unit = Fraction(match["number"]), match["unit"]
    if match["sign"] == "-" or value == 0:
        raise BudgetError(f"budget {text!r}: must be more than zero")
    asked = text.strip()
    if unit.lower() in ("bit", "bits"):
        if value > 8 * FLOAT_BYTES:
            raise BudgetError(f"budget {text!r}: more than the {8 * FLOAT_BYTES} bits of a float32 weight")
        return Budget("bits", value, asked)
    if unit == "%":
        if value > 100:
            raise BudgetError(f"budget {text!r}: more than the float32 model itself")
        return Budget("percent", value, asked)
    if unit not in UNITS:  # also "b" and "Mb", which could be bits
        raise BudgetError(f"budget {text!r}: unknown unit {unit!r}, {_EXPECTED}")
    size = value * UNITS[unit]
    if size < 1:
        raise BudgetError(f"budget {text!r}: less than one byte")
    return Budget("bytes", size, asked)
