"""Step ``candidates``: memory, local cost and Pareto front of one layer's candidates (docs/METHOD.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.calibration.covariance import moments_of_tensors
from mlorq.codecs.base import Accounting, Residency, Storage
from mlorq.config.layer_overrides import layer_search
from mlorq.costs.local import candidate_table
from mlorq.fitting.base import LayerFit
from mlorq.fitting.covariance_fit import covariance_fit
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.fitting.settings import FitSettings
from mlorq.forms import FORMS, Shape
from mlorq.models.layer_list import LINEAR, Layer
from mlorq.models.layers import weight_matrix
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """Settings of a layer's candidates.

    Attributes:
        layer: its name.
        forms: settings of its permitted forms, by the form's name.
        accounting: how bytes are counted.
        fit: settings of the fit of one candidate's matrices.
        residency: how the runtime that the model is meant for holds the layer; None: none is chosen.
    """

    layer: str
    forms: Mapping[str, Mapping[str, Any]]
    accounting: Accounting
    fit: FitSettings
    residency: Residency | None = None


@dataclass(frozen=True)
class Inputs:
    """The ``capture`` and ``layers`` artifacts, and the model whose weights are compressed."""

    capture: ArtifactRef
    layers: ArtifactRef
    model: ModelRef


@dataclass(frozen=True)
class Fits:
    """The fits of one layer.

    Attributes:
        search: of its candidates, in the metric of the settings.
        hessian: under the label-free Hessian, where rounding starts.
    """

    search: LayerFit
    hessian: HessianFit


def params_of(session: Session, layer: Layer) -> Params:
    """The settings of a layer's candidates in the run's configuration."""
    search = layer_search(session.config.search, layer)
    forms = {name: settings.model_dump(mode="json") for name, settings in search.form_settings.items()}
    return Params(layer.name, forms, search.accounting, search.fit, residency_of(layer, session.config.residency))


def residency_of(layer: Layer, residency: Residency | None) -> Residency | None:
    """How a runtime holds a layer: convolutions are decoded, unless it keeps all tensors packed."""
    return Residency() if residency is not None and layer.kind != LINEAR and not residency.packed else residency


def spec(session: Session, model: ModelRef, capture: ArtifactRef, layers: ArtifactRef, layer: Layer) -> StepSpec:
    """Depends on the layer's weight and Hessian (by the capture's key) and the candidates' settings."""
    return STEP.spec(params_of(session, layer), Inputs(capture, layers, model), layer)


def fits_of(context: Context, model: ModelRef, capture: ArtifactRef, layer: Layer, settings: FitSettings) -> Fits:
    """The fits of a layer.

    Args:
        context: of the worker.
        model: the float model.
        capture: the ``capture`` artifact, with the layer's Hessian and moments.
        layer: the layer.
        settings: of the fit of a candidate's matrices.
    """
    weight = weight_matrix(context.model(model).module.get_submodule(layer.name))
    tensors = context.artifacts.moments(capture, layer.name)
    hessian = HessianFit(weight, tensors["hessian"].to(context.device), settings)
    if settings.metric == "moments" and "inputs" in tensors:
        return Fits(covariance_fit(weight, moments_of_tensors(tensors, context.device), settings), hessian)
    return Fits(hessian, hessian)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    layer = context.artifacts.layers(inputs.layers)[params.layer]
    fit = fits_of(context, inputs.model, inputs.capture, layer, params.fit).search
    forms = {name: FORMS[name].settings.model_validate(values) for name, values in params.forms.items()}
    shape = Shape(layer.out_features, layer.in_features, layer.groups)
    storage = Storage(params.accounting, fit.zero_point, params.residency)
    table = candidate_table(fit, shape, forms, storage)
    return {"candidates.parquet": table_bytes(table)}


STEP = Step("candidates", 8, Params, Inputs, run)
