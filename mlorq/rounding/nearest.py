"""Nearest rounding: every value to its closest code."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mlorq.fitting.hessian_fit import LayerSearch
from mlorq.forms.base import Candidate
from mlorq.rounding.base import RoundingResult, RoundingSettings, output_error
from mlorq.rounding.paired_forward import InputMoments


def round_nearest(
    name: str,
    search: LayerSearch,
    candidate: Candidate,
    moments: InputMoments | None,
    settings: RoundingSettings,
    progress: Callable[[int, int], None] | None = None,
    bias: Tensor | None = None,
) -> RoundingResult:
    """Round one layer to nearest; ``moments`` only serve to report the error."""
    layer = search.realise(name, candidate)
    error = None if moments is None else output_error(search.weight, layer.dense().to(search.weight.device), moments)
    return RoundingResult(layer, error, error)
