"""Step ``candidates``: every candidate of one layer with memory, local cost and Pareto front."""

from __future__ import annotations

from typing import Any

from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.codecs.base import Storage
from mlorq.config.layer_overrides import layer_search
from mlorq.config.sections import SearchConfig
from mlorq.costs.local import candidate_table
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import FORMS, Shape
from mlorq.models.layers import Layer
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def candidate_params(search: SearchConfig) -> dict[str, Any]:
    """The parameters that decide a layer's candidates."""
    return {
        "forms": {name: settings.model_dump(mode="json") for name, settings in search.form_settings.items()},
        "accounting": search.accounting,
        "fit": fit_params(search),
    }


def fit_params(search: SearchConfig) -> dict[str, Any]:
    """The parameters that decide the matrices of one given candidate."""
    return search.fit.model_dump(mode="json")


def spec(bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, layer: Layer) -> StepSpec:
    """Depends on the layer's weight and Hessian (by the capture's key) and the candidates' settings."""
    params = {"layer": layer.name, **candidate_params(layer_search(bench.config.search, layer))}
    return STEP.spec(params, {"capture": capture, "layers": layers, **bench.model_inputs}, layer)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    layer = bench.layer_list(spec.artifact("layers"))[params["layer"]]
    settings = FitSettings.model_validate(params["fit"])
    fit, _ = bench.fits(layer, spec.artifact("capture"), settings)
    forms = {name: FORMS[name].settings.model_validate(values) for name, values in params["forms"].items()}
    shape = Shape(layer.out_features, layer.in_features, layer.groups)
    table = candidate_table(fit, shape, forms, Storage(params["accounting"], settings.zero_point))
    return {"candidates.parquet": table_bytes(table)}


STEP = Step("candidates", 5, run)
