"""Step ``sensitivity``: global costs of one layer's candidates, measured on the model's output."""

from __future__ import annotations

from mlorq.layers import Layer
from mlorq.sensitivity import LayerProbe, measured_sensitivity
from mlorq.store import ArtifactRef, table_bytes
from steps.base import Progress, Step, StepSpec
from steps.candidates import settings_of, settings_params
from steps.workbench import Workbench


def spec(
    bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, candidates: ArtifactRef, layer: Layer
) -> StepSpec:
    """Depends on the layer's candidates, the model and the calibration data."""
    search = bench.config.search
    params = {
        "layer": layer.name,
        "how": search.sensitivity,
        "samples": search.samples,
        "points": search.points,
        **settings_params(search),
    }
    inputs: dict[str, ArtifactRef | str] = {
        "model": bench.model.key,
        "calibration": bench.calibration.key,
        "layers": layers,
        "capture": capture,
        "candidates": candidates,
    }
    return STEP.spec(params, inputs, layer)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    layers = bench.layer_list(spec.artifact("layers"))
    layer = layers[spec.params["layer"]]
    search = bench.search(layer, spec.artifact("capture"), settings_of(spec.params))
    table = bench.store.read_table(spec.artifact("candidates"), "candidates.parquet")
    how = spec.params["how"]
    # Candidates in the metric of moments are fitted on one fold: they are measured on samples of the other.
    batches = bench.held_out(spec.params["samples"]) if search.is_fitted else bench.batches(spec.params["samples"])
    points = 1 if how == "closed_form" else spec.params["points"]
    with LayerProbe(bench.model, layer, layers.blocks, batches, bench.device) as probe:
        costs = measured_sensitivity(
            probe, search, table, points=points, closed_form=how != "measured", progress=progress
        )
    return {"sensitivity.parquet": table_bytes(costs)}


STEP = Step("sensitivity", 2, run)
