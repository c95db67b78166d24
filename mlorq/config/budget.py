"""Memory budgets, and their conversion to bytes of the compressible layers (METHOD 2).

A budget is an average number of bits per weight (``3bit``), a percentage of the float32 size of the compressible layers
(``12.5%``), or the size of the whole checkpoint (``25MB``, ``25MiB``). Each is converted to the bytes that the
compressible layers may take, in exact rational arithmetic, rounded down.

Text is parsed once, at the boundary: on the command line, in a configuration, in a flow's parameters. All other code
passes a ``Budget``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from mlorq.codecs.base import FLOAT_BYTES
from mlorq.errors import BudgetError

BudgetKind = Literal["bits", "percent", "bytes", "layers"]

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
_EXPECTED = "expected bits per weight (3bit), a percentage (12.5%) or a size (25MB, 25MiB, 800kB, 123456B)"


@dataclass(frozen=True)
class Budget:
    """A memory budget.

    Attributes:
        kind: ``bits``, ``percent`` and ``layers`` bound the compressible layers, ``bytes`` the whole checkpoint.
        value: average bits per weight (``bits``), percent of the float32 size (``percent``), or bytes (``bytes``,
            ``layers``). A ``Fraction``, because binary floating point could change a budget by a byte.
        text: the budget as the user wrote it; only displayed.
    """

    kind: BudgetKind
    value: Fraction
    text: str

    @classmethod
    def of_layers(cls, size: int, text: str) -> Budget:
        """A budget of an exact number of bytes for the compressible layers.

        Args:
            size: bytes.
            text: label that is displayed.
        """
        return cls("layers", Fraction(size), text)

    def __str__(self) -> str:
        return self.text

    @property
    def whole_bits(self) -> int | None:
        """Bits per weight, if this is a budget in bits and they are an integer; else None."""
        return int(self.value) if self.kind == "bits" and self.value.denominator == 1 else None

    def compressible_bytes(self, compressible_params: int, rest_bytes: int) -> int:
        """Total bytes that the weights of the compressible layers may take.

        Args:
            compressible_params: number of weights of the compressible layers (shared weights once, biases excluded).
            rest_bytes: bytes of everything else in the checkpoint, file headers included
                (``mlorq.checkpoint.size_bound.rest_upper_bound``); used only by kind ``bytes``.

        Raises:
            BudgetError: the rest alone exceeds the budget.
        """
        if self.kind == "layers":
            return int(self.value)
        if self.kind == "bits":
            return int(self.value * compressible_params // 8)
        if self.kind == "percent":
            return int(self.value * FLOAT_BYTES * compressible_params // 100)
        allowed = int(self.value // 1) - rest_bytes
        if allowed < 0:
            raise BudgetError(
                f"budget {self.text} is too small: the uncompressed tensors and the file headers of the checkpoint "
                f"take {rest_bytes} bytes; ask for more than {rest_bytes}B"
            )
        return allowed

    def to_json(self) -> dict[str, str]:
        """The budget as JSON values, for ``from_json``; the value is a ratio of integers and stays exact."""
        return {"kind": self.kind, "value": str(self.value), "text": self.text}

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> Budget:
        """The inverse of ``to_json``.

        Raises:
            BudgetError: the JSON value is malformed.
        """
        try:
            kind, number, text = value["kind"], Fraction(value["value"]), value["text"]
        except (TypeError, KeyError, ValueError, ZeroDivisionError):
            raise BudgetError(f"budget {value!r}: expected an object with kind, value and text") from None
        for known in get_args(BudgetKind):
            if kind == known:
                return cls(known, number, text)
        raise BudgetError(f"budget {value!r}: unknown kind {kind!r}; known: {', '.join(get_args(BudgetKind))}")


def parse_budget(text: str) -> Budget:
    """Parse a budget: ``3bit``, ``2.5 bits``, ``12.5%``, ``25MB`` (10⁶ bytes), ``25MiB`` (2²⁰), ``800kB``, ``9B``.

    Raises:
        BudgetError: the text cannot be parsed, is not positive, or exceeds the float32 model.
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
    if unit not in UNITS:  # includes "b" and "Mb", which could mean bits
        raise BudgetError(f"budget {text!r}: unknown unit {unit!r}, {_EXPECTED}")
    size = value * UNITS[unit]
    if size < 1:
        raise BudgetError(f"budget {text!r}: less than one byte")
    return Budget("bytes", size, asked)


def parse_budgets(texts: str | Iterable[str]) -> list[Budget]:
    """Parse one budget or several.

    Raises:
        BudgetError: a budget cannot be parsed; the message names the first.
    """
    return [parse_budget(text) for text in ([texts] if isinstance(texts, str) else texts)]
