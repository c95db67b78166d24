"""What a budget allows, in bytes (METHOD 2).

A budget is written as average bits per weight (``3bit``), as a share of the float32 size of the compressible layers
(``12.5%``), or as the size of the whole checkpoint (``25MB``, ``25MiB``). Each becomes the bytes that the compressible
layers may take, in exact rational arithmetic, always rounded down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mlorq.codecs.base import FLOAT_BYTES
from mlorq.errors import BudgetError

BudgetKind = Literal["bits", "percent", "bytes"]

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
