"""The compute budget: most bit operations per sample."""

from __future__ import annotations

from mlorq.config.sections import COMPUTE, NO_COMPUTE
from mlorq.errors import ConfigError

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_compute(text: str, macs: float, product_macs: float) -> float:
    """Most bit operations per sample.

    Args:
        text: ``"4x4"``, those of 4-bit weights and 4-bit activations everywhere, or a number of them, ``"20G"``.
        macs: multiply-accumulates of the layers.
        product_macs: of the products of activations.

    Raises:
        ConfigError: the text is neither; a configuration refuses it before (``mlorq.config.sections.COMPUTE``).
    """
    found = COMPUTE.fullmatch(text.strip().lower())
    if not found:
        raise ConfigError(f"activations.compute: {text!r} {NO_COMPUTE}")
    if found["weights"]:
        weights, inputs = float(found["weights"]), float(found["inputs"])
        return weights * inputs * macs + inputs**2 * product_macs
    return float(found["number"]) * PREFIXES[found["unit"]]
