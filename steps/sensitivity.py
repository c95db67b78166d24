"""Step ``sensitivity``: global costs of one layer's candidates, measured on the model's output."""

from __future__ import annotations

from dataclasses import dataclass

from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.config.layer_overrides import layer_search
from mlorq.config.run import Sensitivity
from mlorq.costs.calibrated import scaled_sensitivity
from mlorq.costs.measured import LayerProbe, local_sensitivity, measured_sensitivity
from mlorq.fitting.hessian_fit import CandidateSettings
from mlorq.models.layers import Layer
from steps.base import Progress, Step, StepSpec
from steps.candidates import search_of, settings_of
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.measuring import Measuring, measuring
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """How local costs of a layer become global ones.

    Attributes:
        layer: which.
        how: as ``search.sensitivity``.
        settings: what decides the layer's candidates.
        measuring: of the cost; None where ``how`` is ``local``, which measures none.
        points: candidates to measure.
        tolerance: of ``auto``: no further measurements where costs were predicted this well.
    """

    layer: str
    how: Sensitivity
    settings: CandidateSettings
    measuring: Measuring | None = None
    points: int | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Inputs:
    """The model, the calibration data, and the layer's candidates with what they were made from."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    candidates: ArtifactRef


def spec(
    session: Session,
    model: ModelRef,
    capture: ArtifactRef,
    layers: ArtifactRef,
    candidates: ArtifactRef,
    layer: Layer,
) -> StepSpec:
    """Depends on the layer's candidates, the model and the calibration data."""
    search = session.config.search
    settings = settings_of(layer_search(search, layer))
    params = Params(layer.name, search.sensitivity, settings)
    if search.sensitivity != "local":
        tolerance = search.tolerance if search.sensitivity == "auto" else None
        measured = measuring(session, [layer])
        params = Params(layer.name, search.sensitivity, settings, measured, search.points, tolerance)
    return STEP.spec(params, Inputs(model, session.calibration_ref, layers, capture, candidates), layer)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    layers = context.artifacts.layers(inputs.layers)
    layer = layers[params.layer]
    table = context.artifacts.table(inputs.candidates, "candidates.parquet")
    if params.measuring is None or params.points is None:
        return {"sensitivity.parquet": table_bytes(local_sensitivity(table))}
    search = search_of(context, inputs.model, inputs.capture, layer, params.settings)
    batches, labels = params.measuring.of(context.calibration(inputs.calibration))
    model, points = context.model(inputs.model), params.points
    with LayerProbe(
        model, layer, layers.blocks, batches, context.device, cost=params.measuring.cost, labels=labels
    ) as probe:
        if params.how == "measured":
            costs = measured_sensitivity(probe, search, table, points=points, progress=progress)
        elif params.how == "closed_form":
            costs = scaled_sensitivity(probe, search, table, points=1, progress=progress)
        else:
            assert params.tolerance is not None
            costs = scaled_sensitivity(
                probe, search, table, points=points, tolerance=params.tolerance, progress=progress
            )
    return {"sensitivity.parquet": table_bytes(costs)}


STEP = Step("sensitivity", 5, Params, Inputs, run)
