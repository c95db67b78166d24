"""Step ``sensitivity``: global costs of one layer's candidates (docs/METHOD.md, sections 5 and 7)."""

from __future__ import annotations

from dataclasses import dataclass

from mlorq.artifacts.store import ArtifactRef, table_bytes
from mlorq.config.run import Sensitivity
from mlorq.costs.calibrated import calibrated_sensitivity
from mlorq.costs.first_order import first_order_sensitivity
from mlorq.costs.float_passes import FloatPasses
from mlorq.costs.measured import LayerProbe, local_sensitivity, measured_sensitivity
from mlorq.models.layer_list import Layer
from steps import candidates as enumeration
from steps.base import Progress, Step, StepSpec
from steps.candidates import fits_of
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.measuring import Measuring, measuring
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """How global costs are obtained from a layer's local costs.

    Attributes:
        candidates: parameters of the layer's ``candidates`` step.
        how: as ``search.sensitivity``.
        measuring: of the cost; None if ``how`` is ``local``, which measures nothing.
        points: for ``measured`` and ``first_order``: number of candidates to measure per curve, or per form at most.
    """

    candidates: enumeration.Params
    how: Sensitivity
    measuring: Measuring | None = None
    points: int | None = None

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.candidates.layer


@dataclass(frozen=True)
class Inputs:
    """The model, the calibration data, the layer's candidates and their inputs."""

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
    made_from = enumeration.params_of(session, layer)
    params = Params(made_from, search.sensitivity)
    if search.sensitivity != "local":
        points = search.points if search.sensitivity in ("measured", "first_order") else None
        params = Params(made_from, search.sensitivity, measuring(session, [layer]), points)
    return STEP.spec(params, Inputs(model, session.calibration_ref, layers, capture, candidates), layer)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    layers = context.artifacts.layers(inputs.layers)
    layer = layers[params.layer]
    table = context.artifacts.table(inputs.candidates, "candidates.parquet")
    if params.measuring is None:
        return {"sensitivity.parquet": table_bytes(local_sensitivity(table))}
    fit = fits_of(context, inputs.model, inputs.capture, layer, params.candidates.fit).search
    batches, labels = params.measuring.of(context.calibration(inputs.calibration))
    if params.how == "first_order" and labels is None:
        batches = list(layers.batches(batches))  # gradients have to belong to samples
    model = context.model(inputs.model)
    same = (inputs.model, inputs.calibration, inputs.layers, params.measuring, params.how)
    passes = context.passes(same, lambda: FloatPasses(model, layers.blocks, batches, context.device))
    with LayerProbe(
        model, layer, layers.blocks, batches, context.device, cost=params.measuring.cost, labels=labels, passes=passes
    ) as probe:
        if params.points is None:
            costs = calibrated_sensitivity(probe, fit, table)
        else:
            sensitivity = first_order_sensitivity if params.how == "first_order" else measured_sensitivity
            costs = sensitivity(probe, fit, table, points=params.points, progress=progress)
    return {"sensitivity.parquet": table_bytes(costs)}


STEP = Step("sensitivity", 9, Params, Inputs, run)
