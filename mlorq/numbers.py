"""Numbers as people read them: ``3.7e-5``, ``0.0824``, ``4.02 MB``, ``4,016,832 B (4.02 MB)``, ``2 min 5 s``."""

from __future__ import annotations

import math
from typing import Any

UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
PLAIN_FROM, PLAIN_TO = 1e-3, 1e6  # sizes of numbers that are written without an exponent


def number(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits; with an exponent if it is very small or very large.

    Args:
        value: None and NaN are shown as a dash.
        digits: significant digits of numbers without an exponent; those with one have two.
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if not PLAIN_FROM <= abs(value) < PLAIN_TO:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def byte_size(count: int | None) -> str:
    """Bytes in the largest unit below: ``4.02 MB``."""
    if count is None:
        return "–"
    unit, scale = next(((unit, scale) for unit, scale in UNITS if count >= scale), ("B", 1))
    return f"{count:,} {unit}" if scale == 1 else f"{number(count / scale)} {unit}"


def byte_count(count: int | None) -> str:
    """An exact number of bytes: ``4,016,832 B (4.02 MB)``."""
    if count is None:
        return "–"
    exact = f"{count:,} B"
    return exact if count < UNITS[-1][1] else f"{exact} ({byte_size(count)})"


def duration(seconds: float) -> str:
    """Seconds as ``0.42 s``, ``12 s``, ``2 min 5 s`` or ``1 h 4 min``; less than a hundredth as ``0 s``."""
    if seconds < 10:
        return f"{number(round(seconds, 2), 2)} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def cell(value: Any) -> str:
    """The value of a table's cell; names and texts stay as they are."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value, 4) if isinstance(value, float) else str(value)
