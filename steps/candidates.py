"""Step ``candidates``: every candidate of one layer with memory, local cost and Pareto front."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.calibration.covariance import moments_of_tensors
from mlorq.config.layer_overrides import layer_search
from mlorq.config.run import SearchConfig
from mlorq.fitting.hessian_fit import CandidateSettings, LayerSearch
from mlorq.fitting.moment_search import MomentSearch
from mlorq.models.layers import Layer, weight_matrix
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import ModelRef
from steps.session import Session

# What decides the matrices of one given candidate; the other settings decide which candidates there are.
FIT = ("metric", "factor_split", "zero_point", "percentiles")


@dataclass(frozen=True)
class Params:
    """The layer, and what decides its candidates."""

    layer: str
    settings: CandidateSettings


@dataclass(frozen=True)
class Inputs:
    """The ``capture`` and ``layers`` artifacts, and the model whose weights are compressed."""

    capture: ArtifactRef
    layers: ArtifactRef
    model: ModelRef


def settings_of(search: SearchConfig) -> CandidateSettings:
    """What decides a layer's candidates."""
    return _settings(search, tuple(field.name for field in fields(CandidateSettings)))


def fit_settings_of(search: SearchConfig) -> CandidateSettings:
    """What decides the matrices of one given candidate; which candidates there are is left at its defaults."""
    return _settings(search, FIT)


def _settings(search: SearchConfig, names: tuple[str, ...]) -> CandidateSettings:
    given = {name: getattr(search, name) for name in names}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return CandidateSettings(**values)


def spec(session: Session, model: ModelRef, capture: ArtifactRef, layers: ArtifactRef, layer: Layer) -> StepSpec:
    """Depends on the layer's weight and Hessian (by the capture's key) and the candidates' settings."""
    params = Params(layer.name, settings_of(layer_search(session.config.search, layer)))
    return STEP.spec(params, Inputs(capture, layers, model), layer)


def search_of(
    context: Context, model: ModelRef, capture: ArtifactRef, layer: Layer, settings: CandidateSettings
) -> LayerSearch:
    """The candidates of a layer.

    Args:
        context: of the worker.
        model: whose weight is compressed.
        capture: the ``capture`` artifact, with the layer's Hessian and moments.
        layer: which.
        settings: what decides them.
    """
    weight = weight_matrix(context.model(model).module.get_submodule(layer.name))
    tensors = context.artifacts.moments(capture, layer.name)
    hessian = tensors["hessian"].to(context.device)
    if settings.metric == "moments" and "inputs" in tensors:
        return MomentSearch(weight, hessian, settings, moments_of_tensors(tensors, context.device))
    return LayerSearch(weight, hessian, settings, layer.groups)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    layer = context.artifacts.layers(inputs.layers)[params.layer]
    search = search_of(context, inputs.model, inputs.capture, layer, params.settings)
    return {"candidates.parquet": table_bytes(search.table())}


STEP = Step("candidates", 5, Params, Inputs, run)
