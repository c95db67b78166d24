"""Step ``candidates``: every candidate of one layer with memory, local cost and Pareto front."""

from __future__ import annotations

from typing import Any

from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.config.layer_overrides import layer_search
from mlorq.config.run import SearchConfig
from mlorq.fitting.hessian_fit import CandidateSettings
from mlorq.models.layers import Layer
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def settings_params(search: SearchConfig) -> dict[str, Any]:
    """The parameters that decide a layer's candidates."""
    return {
        "bits": list(search.bits),
        "factor_bits": list(search.factor_bits),
        "rank_multiple": search.rank_multiple,
        "forms": list(search.forms),
        "sum_bits": list(search.sum_bits),
        "sum_factor_bits": list(search.sum_factor_bits),
        "sum_ranks": list(search.sum_ranks),
        "accounting": search.accounting,
        **quantizer_params(search),
    }


def quantizer_params(search: SearchConfig) -> dict[str, Any]:
    """The parameters that decide the matrices of one given candidate."""
    return {
        "metric": search.metric,
        "factor_split": search.factor_split,
        "zero_point": search.zero_point,
        "percentiles": list(search.percentiles),
    }


def settings_of(params: dict[str, Any]) -> CandidateSettings:
    """Settings from either kind of parameters."""
    names = CandidateSettings.__dataclass_fields__
    known = {name: value for name, value in params.items() if name in names}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return CandidateSettings(**values)


def spec(bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, layer: Layer) -> StepSpec:
    """Depends on the layer's weight and Hessian (by the capture's key) and the candidates' settings."""
    params = {"layer": layer.name, **settings_params(layer_search(bench.config.search, layer))}
    return STEP.spec(params, {"capture": capture, "layers": layers, **bench.model_inputs}, layer)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    layer = bench.layer_list(spec.artifact("layers"))[spec.params["layer"]]
    search = bench.search(layer, spec.artifact("capture"), settings_of(spec.params))
    return {"candidates.parquet": table_bytes(search.table())}


STEP = Step("candidates", 4, run)
