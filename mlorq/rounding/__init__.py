"""Rounding: the codes of the candidates that the allocation chose. One method a file, one signature.

A method gets a layer's search (its matrices and quantizers), the chosen candidate, the second moments of the layer's
inputs where it needs them, and its settings; it returns the stored layer and what it did.
"""

from __future__ import annotations

from collections.abc import Callable

from mlorq.candidates import LayerSearch
from mlorq.forms import Candidate, CompressedLayer
from mlorq.paired import InputMoments
from mlorq.rounding.base import RoundingResult, RoundingSettings
from mlorq.rounding.lra import round_lra
from mlorq.rounding.nearest import round_nearest

Method = Callable[
    [str, LayerSearch, Candidate, InputMoments | None, RoundingSettings, Callable[[int, int], None] | None],
    RoundingResult,
]

METHODS: dict[str, Method] = {"nearest": round_nearest, "lra": round_lra}
NEEDS_MOMENTS = {"lra"}

__all__ = ["METHODS", "NEEDS_MOMENTS", "CompressedLayer", "Method", "RoundingResult", "RoundingSettings"]
