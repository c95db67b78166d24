"""What runtimes that compute exported graphs hold of a model's weights: the memory that a budget can bound."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlorq.codecs.base import FLOAT_BYTES, Residency
from mlorq.registry import Settings


class GraphPrecision(Settings):
    """Options of such a runtime as a target."""

    precision: Literal["exact", "fast"] = Field(
        "exact", description="of mlorq.load; fast: decoded weights are rounded to 8 bits"
    )


def graph_residency(settings: Settings, code_bits: tuple[int, ...]) -> Residency:
    """Affine codes stay packed; other matrices are decoded to float32, or to 8 bits (``fast``).

    Args:
        settings: precision.
        code_bits: bit-widths of the runtime's kernels.
    """
    assert isinstance(settings, GraphPrecision)
    return Residency(code_bits, 8 if settings.precision == "fast" else 8 * FLOAT_BYTES)
