"""Fits, candidates and rounded layers for tests, in few words."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from mlorq.codecs.base import Accounting, Storage, ZeroPoint
from mlorq.config.sections import SearchConfig, search_section
from mlorq.costs.local import candidate_table
from mlorq.fitting.base import LayerFit
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import FORMS, Candidate, Shape
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.rounding import METHODS, RoundingResult, RoundingTask
from mlorq.rounding.paired_forward import InputMoments


def search_config(**values: Any) -> SearchConfig:
    """The ``search`` section, with the keys of all forms."""
    return search_section().model_validate(values)


def hessian_fit(weight: Tensor, hessian: Tensor | None = None, **settings: Any) -> HessianFit:
    """The paper's fit of a weight; all entries weigh the same where no Hessian is given."""
    return HessianFit(weight, torch.ones_like(weight) if hessian is None else hessian, FitSettings(**settings))


def table_of(fit: LayerFit, groups: int = 1, **search: Any) -> pa.Table:
    """The candidate table of a layer with keys of the ``search`` section."""
    config = search_config(**search)
    return candidate_table(fit, Shape(*fit.weight.shape, groups), config.form_settings, config.storage)


def dense(fit: LayerFit, candidate: Candidate) -> Tensor:
    """Ŵ of a candidate as the search judges it."""
    return FORMS[candidate.form].dense(fit, candidate)


def stored(fit: LayerFit, candidate: Candidate, name: str = "layer") -> CompressedLayer:
    """A candidate rounded to nearest by the fit, as it is stored."""
    return CompressedLayer.of_rounded(name, candidate, FORMS[candidate.form].fit(fit, candidate))


def round_layer(
    method: str,
    fit: HessianFit,
    candidate: Candidate,
    moments: InputMoments | None = None,
    bias: Tensor | None = None,
    *,
    layer: str = "layer",
    **settings: Any,
) -> RoundingResult:
    """One layer rounded by a method, with keys of the ``rounding`` section."""
    chosen = METHODS[method]
    task = RoundingTask(layer, candidate, fit, fit.output_metric, moments, bias)
    return chosen.round(task, chosen.layer_settings.model_validate(settings))


def size_of(
    candidate: Candidate, rows: int, columns: int, accounting: Accounting = "exact", zero_point: ZeroPoint = "codes"
) -> int:
    """Bytes of a candidate of a layer ``(rows, columns)``."""
    return FORMS[candidate.form].size(candidate, Shape(rows, columns), Storage(accounting, zero_point))


def matrices_of(candidate: Candidate, rows: int, columns: int) -> dict[str, tuple[int, int, int]]:
    """``{name: (rows, columns, bits)}`` of a candidate's stored matrices."""
    found = FORMS[candidate.form].matrices(candidate, Shape(rows, columns))
    return {name: (spec.rows, spec.columns, spec.codec.bits) for name, spec in found.items()}
