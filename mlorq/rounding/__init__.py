"""Rounding: the codes of the candidates that the allocation chose. One method a file, one signature.

A method gets a layer's search (its matrices and quantizers), the chosen candidate, the second moments of the layer's
inputs where it needs them, its settings and its bias; it returns the stored layer and what it did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mlorq.fitting.hessian_fit import LayerSearch
from mlorq.forms.base import Candidate, CompressedLayer
from mlorq.rounding.base import RoundingResult, RoundingSettings
from mlorq.rounding.closed_form import round_closed_form, round_gptq
from mlorq.rounding.erq import round_erq
from mlorq.rounding.lra import round_lra
from mlorq.rounding.nearest import round_nearest
from mlorq.rounding.paired_forward import InputMoments


class Method(Protocol):
    """What every method is called with."""

    def __call__(
        self,
        name: str,
        search: LayerSearch,
        candidate: Candidate,
        moments: InputMoments | None,
        settings: RoundingSettings,
        progress: Callable[[int, int], None] | None = None,
        bias: Tensor | None = None,
    ) -> RoundingResult: ...


METHODS: dict[str, Method] = {
    "nearest": round_nearest,
    "lra": round_lra,
    "gptq": round_gptq,
    "closed_form": round_closed_form,
    "erq": round_erq,
    # Where reconstruction by blocks starts:
    "block": round_closed_form,
    "brecq": round_nearest,
    "qdrop": round_nearest,
}
NEEDS_MOMENTS = {"lra", "gptq", "closed_form", "block", "erq"}
BY_BLOCKS = {"block", "brecq", "qdrop"}

__all__ = ["BY_BLOCKS", "METHODS", "NEEDS_MOMENTS", "CompressedLayer", "Method", "RoundingResult", "RoundingSettings"]
