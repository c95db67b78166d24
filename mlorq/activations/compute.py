"""Compute budgets: the most bit operations per sample (METHOD 8, ``activations.compute``).

A bit operation is the product of one bit of a weight with one bit of an activation.
"""

from __future__ import annotations

import re

from mlorq.errors import ConfigError

_NUMBER = r"0*[1-9]\d*(?:\.\d+)?|0*\.\d*[1-9]\d*"  # positive
_COMPUTE = re.compile(
    rf"(?P<weights>{_NUMBER})\s*x\s*(?P<inputs>{_NUMBER})|(?P<number>{_NUMBER})\s*(?P<unit>[kmgt]?)(?:bops?)?"
)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def checked_compute(text: str) -> str:
    """The text itself, after a check that it is a compute budget.

    Raises:
        ValueError: it is not a compute budget.
    """
    _matched(text)
    return text


def parse_compute(text: str, macs: float, product_macs: float) -> float:
    """A compute budget as the largest number of bit operations per sample.

    Args:
        text: ``"4x4"`` (that of 4-bit weights and 4-bit activations everywhere), or a number such as ``"20G"``.
        macs: multiply-accumulates per sample of the layers.
        product_macs: multiply-accumulates per sample of the products of activations.

    Raises:
        ConfigError: the text is neither of them.
    """
    try:
        found = _matched(text)
    except ValueError as error:
        raise ConfigError(f"activations.compute: {error}") from None
    if found["weights"]:
        weights, inputs = float(found["weights"]), float(found["inputs"])
        return weights * inputs * macs + inputs**2 * product_macs
    return float(found["number"]) * _UNITS[found["unit"]]


def _matched(text: str) -> re.Match[str]:
    found = _COMPUTE.fullmatch(text.strip().lower())
    if not found:
        raise ValueError(
            f'{text!r} is not a compute budget: write bit-widths as in "4x4", or a number of bit operations as in "20G"'
        )
    return found
