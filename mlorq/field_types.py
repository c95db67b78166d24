"""Types of configuration keys that several settings share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def distinct_bit_widths(value: list[int]) -> list[int]:
    """Bit-widths in rising order.

    Raises:
        ValueError: one lies outside 2 to 8, or is there twice.
    """
    if any(not 2 <= bits <= 8 for bits in value):
        raise ValueError("bit-widths are whole numbers from 2 to 8")
    if len(set(value)) != len(value):
        raise ValueError("bit-widths must differ")
    return sorted(value)


def distinct_percentiles(value: list[float]) -> list[float]:
    """Upper percentiles in rising order, each once.

    Raises:
        ValueError: the list is empty, or one lies outside (0.5, 1].
    """
    if not value or any(not 0.5 < p <= 1 for p in value):
        raise ValueError("percentiles lie in (0.5, 1]")
    return sorted(set(value))


BitWidths = Annotated[list[int], AfterValidator(distinct_bit_widths)]
Percentiles = Annotated[list[float], AfterValidator(distinct_percentiles)]
