"""Step ``sensitivity``: global costs of one layer's candidates, measured on the model's output."""

from __future__ import annotations

from typing import Any

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.config.layer_overrides import layer_search
from mlorq.costs.calibrated import scaled_sensitivity
from mlorq.costs.measured import LayerProbe, local_sensitivity, measured_sensitivity
from mlorq.errors import DataError
from mlorq.fitting.settings import FitSettings
from mlorq.models.layers import Layer
from steps.base import Progress, Step, StepSpec
from steps.candidates import candidate_params
from steps.context import Workbench


def spec(
    bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, candidates: ArtifactRef, layer: Layer
) -> StepSpec:
    """Depends on the layer's candidates, the model and the calibration data."""
    search = bench.config.search
    params = {
        "layer": layer.name,
        "how": search.sensitivity,
        **({} if search.sensitivity == "local" else {"samples": search.samples, "points": search.points}),
        **({"tolerance": search.tolerance} if search.sensitivity == "auto" else {}),
        **({} if search.sensitivity == "local" else cost_params(bench)),
        **candidate_params(layer_search(search, layer)),
    }
    inputs: dict[str, ArtifactRef | str] = {
        **bench.model_inputs,
        "calibration": bench.calibration.key,
        "layers": layers,
        "capture": capture,
        "candidates": candidates,
    }
    return STEP.spec(params, inputs, layer)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    layers = bench.layer_list(spec.artifact("layers"))
    layer = layers[spec.params["layer"]]
    if spec.params["how"] == "local":
        table = bench.store.read_table(spec.artifact("candidates"), "candidates.parquet")
        return {"sensitivity.parquet": table_bytes(local_sensitivity(table))}
    fit, _ = bench.fits(layer, spec.artifact("capture"), FitSettings.model_validate(spec.params["fit"]))
    table = bench.store.read_table(spec.artifact("candidates"), "candidates.parquet")
    params = spec.params
    how, points = params["how"], params["points"]
    # Candidates in the metric of moments are fitted on one fold: they are measured on samples of the other.
    batches, labels = bench.measuring(params["samples"], held_out=fit.held_out)
    with LayerProbe(
        bench.model, layer, layers.blocks, batches, bench.device, cost=params["cost"], labels=labels
    ) as probe:
        if how == "measured":
            costs = measured_sensitivity(probe, fit, table, points=points, progress=progress)
        elif how == "closed_form":
            costs = scaled_sensitivity(probe, fit, table, points=1, progress=progress)
        else:
            costs = scaled_sensitivity(
                probe, fit, table, points=points, tolerance=params["tolerance"], progress=progress
            )
    return {"sensitivity.parquet": table_bytes(costs)}


def cost_params(bench: Workbench) -> dict[str, Any]:
    """What the measured cost of an output depends on beside the samples: which one it is, and the labels it reads.

    Raises:
        DataError: the cost reads labels, and there are none.
    """
    cost = bench.config.search.cost
    if cost != "task":
        return {"cost": cost}
    labels = bench.calibration.labels
    if labels is None:
        raise DataError("search.cost: task needs calibration data with labels; use nmse or kl")
    return {"cost": cost, "labels": digest_json([part.tolist() for part in labels])}


STEP = Step("sensitivity", 5, run)
