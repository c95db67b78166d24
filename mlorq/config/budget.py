"""Memory budgets, and their conversion to bytes of the compressible layers (METHOD 2).

A budget is an average number of bits per weight (``3bit``), a percentage of the float32 size of the compressible layers
(``12.5%``), or the size of the whole checkpoint (``25MB``, ``25MiB``). Each is converted to the bytes that the
compressible layers may take, in exact rational arithmetic, rounded down. ``{disk: 25MB, memory: 40MB}``, as text
``disk=25MB,memory=40MB``, also bounds the weights as the runtime holds them that the model is meant for (``target``).

Text is parsed once, at the boundary: on the command line, in a configuration, in a flow's parameters. All other code
passes a ``Budget``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

from mlorq.codecs.base import FLOAT_BYTES
from mlorq.errors import BudgetError
from mlorq.numbers import byte_count

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
PARTS = ("disk", "memory")
LONGEST = 200  # characters of a budget

_BUDGET = re.compile(r"\s*(?P<sign>[+-]?)(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]+|%)\s*", re.ASCII)
_DECIMALS = re.compile(r"\d*\.\d{4,}")
_EXPECTED = "expected bits per weight (3bit), a percentage (12.5%) or a size (25MB, 25MiB, 800kB, 123456B)"


def size_bytes(text: str) -> int:
    """Bytes of a size such as ``8GB``, ``512MiB`` or ``1000B``, rounded down.

    Raises:
        ValueError: it is not a size.
    """
    match = _BUDGET.fullmatch(text) if len(text) <= LONGEST else None
    if match is None or match["unit"] not in UNITS or match["sign"] == "-":
        raise ValueError(f"expected a size (8GB, 512MiB, 1000B), not {text[:LONGEST]!r}")
    return int(Fraction(match["number"]) * UNITS[match["unit"]])


@dataclass(frozen=True)
class Budget:
    """A memory budget.

    Attributes:
        kind: ``bits``, ``percent`` and ``layers`` bound the compressible layers, ``bytes`` the whole checkpoint.
        value: average bits per weight (``bits``), percent of the float32 size (``percent``), or bytes (``bytes``,
            ``layers``). A ``Fraction``, because binary floating point could change a budget by a byte.
        memory: bytes of all weights in the memory of the runtime that the model is meant for; None: any.
        text: the budget as the user wrote it; only displayed, by ``str`` with rounded numbers.
    """

    kind: BudgetKind
    value: Fraction
    text: str
    memory: Fraction | None = None

    @classmethod
    def of_layers(cls, size: int, text: str) -> Budget:
        """A budget of an exact number of bytes for the compressible layers.

        Args:
            size: bytes.
            text: label that is displayed.
        """
        return cls("layers", Fraction(size), text)

    def __str__(self) -> str:
        return shown_budget(self.text)

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
                f"take {byte_count(rest_bytes)}; ask for more than that"
            )
        return allowed

    def held_bytes(self, rest: int | None) -> int | None:
        """Bytes that the compressible layers may take in the memory of a runtime; None: any.

        Args:
            rest: bytes of everything else in its memory; None: no runtime is chosen.

        Raises:
            BudgetError: memory is bounded, and no runtime is chosen, or the rest alone exceeds it.
        """
        if self.memory is None:
            return None
        if rest is None:
            raise BudgetError(
                f"budget {self.text}: memory is that of a runtime: set target, for example target: onnxruntime"
            )
        if self.memory < rest:
            raise BudgetError(
                f"budget {self.text} is too small: the uncompressed tensors take {byte_count(rest)} of memory; "
                "ask for more than that"
            )
        return int(self.memory) - rest

    def to_json(self) -> dict[str, str]:
        """The budget as JSON values, for ``from_json``; the value is a ratio of integers and stays exact."""
        bounded = {} if self.memory is None else {"memory": str(self.memory)}
        return {"kind": self.kind, "value": str(self.value), "text": self.text, **bounded}

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> Budget:
        """The inverse of ``to_json``.

        Raises:
            BudgetError: the JSON value is malformed.
        """
        try:
            kind, number, text = value["kind"], Fraction(value["value"]), value["text"]
            memory = Fraction(value["memory"]) if "memory" in value else None
        except (TypeError, KeyError, ValueError, ZeroDivisionError):
            raise BudgetError(f"budget {value!r}: expected an object with kind, value and text") from None
        for known in get_args(BudgetKind):
            if kind == known:
                return cls(known, number, text, memory)
        raise BudgetError(f"budget {value!r}: unknown kind {kind!r}; known: {', '.join(get_args(BudgetKind))}")


def shown_budget(text: str) -> str:
    """A budget for names and tables: numbers with at most three decimals, ``3.586bit`` for ``3.586218910806bit``."""
    return _DECIMALS.sub(lambda number: f"{float(number[0]):.3f}".rstrip("0").rstrip(".") or "0", text)


def budget_text(value: Any) -> Any:
    """A budget as text: ``{"disk": "25MB", "memory": "40MB"}`` becomes ``disk=25MB,memory=40MB``; text stays.

    Raises:
        BudgetError: a key is unknown, or a value is not text.
    """
    if not isinstance(value, Mapping):
        return value
    unknown = [key for key in value if key not in PARTS]
    if unknown or not value or not all(isinstance(size, str) for size in value.values()):
        raise BudgetError(
            f"budget {dict(value)!r:.200}: expected disk, memory or both, as in {{disk: 25MB, memory: 40MB}}"
        )
    return ",".join(f"{key}={value[key].strip()}" for key in PARTS if key in value)


def parse_budget(text: str | Mapping[str, str]) -> Budget:
    """Parse a budget: ``3bit``, ``2.5 bits``, ``12.5%``, ``25MB`` (10⁶ bytes), ``25MiB`` (2²⁰), ``800kB``, ``9B``.

    ``disk=25MB,memory=40MB`` or ``{"disk": "25MB", "memory": "40MB"}``, or one of the two, bounds the memory of a
    runtime as well.

    Raises:
        BudgetError: the text cannot be parsed, is not positive, or exceeds the float32 model.
    """
    asked = budget_text(text)
    if isinstance(asked, str):
        if len(asked) > LONGEST:
            raise BudgetError(f"budget {asked[:40]!r}…: it has more than {LONGEST} characters; {_EXPECTED}")
        asked = " ".join(asked.split())
        if "=" in asked:
            return _in_parts(asked)
    match = _BUDGET.fullmatch(asked) if isinstance(asked, str) else None
    if match is None:
        raise BudgetError(f"budget {text!r:.200}: {_EXPECTED}")
    value, unit = Fraction(match["number"]), match["unit"]
    if match["sign"] == "-" or value == 0:
        raise BudgetError(f"budget {text!r}: must be more than zero")
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


def _in_parts(text: str) -> Budget:
    """A budget of disk, memory or both, as text."""
    parts = [part.partition("=") for part in text.split(",")]
    given = {key.strip(): size.strip() for key, _, size in parts}
    if len(given) < len(parts) or not all(key in PARTS and size and "=" not in size for key, size in given.items()):
        raise BudgetError(f"budget {text!r}: expected disk=SIZE, memory=SIZE or both, as in disk=25MB,memory=40MB")
    asked = ",".join(f"{key}={given[key]}" for key in PARTS if key in given)
    disk = parse_budget(given.get("disk", f"{8 * FLOAT_BYTES}bit"))  # of a budget of memory alone: any size
    if "memory" not in given:
        return replace(disk, text=asked)
    memory = parse_budget(given["memory"])
    if memory.kind != "bytes":
        raise BudgetError(f"budget {text!r}: memory must be a size, such as 40MB")
    return replace(disk, text=asked, memory=memory.value)


def parse_budgets(texts: str | Mapping[str, str] | Iterable[str | Mapping[str, str]]) -> list[Budget]:
    """Parse one budget or several.

    Raises:
        BudgetError: a budget cannot be parsed; the message names the first.
    """
    return [parse_budget(text) for text in ([texts] if isinstance(texts, (str, Mapping)) else texts)]
