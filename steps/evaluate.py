"""Step ``evaluate``: metric and output NMSE of the compressed model, loaded from its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlorq.artifacts.schemas import table_matrix
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.evaluation.outputs import model_outputs, output_nmse
from steps.base import NoParams, Progress, Step, StepSpec
from steps.baseline import measure, stand_in
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Inputs:
    """The checkpoint, the float model's ``baseline``, and the inputs of that."""

    checkpoint: ArtifactRef
    baseline: ArtifactRef
    model: ModelRef
    evaluation: DataRef
    calibration: DataRef | None = None


def spec(session: Session, checkpoint: ArtifactRef, baseline: ArtifactRef) -> StepSpec:
    """Depends on the checkpoint, the evaluation data, and the float model and its outputs there."""
    inputs = Inputs(checkpoint, baseline, session.model_ref, session.evaluation_ref, stand_in(session))
    return STEP.spec(NoParams(), inputs)


def run(params: NoParams, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    model, evaluation = context.model(inputs.model), context.evaluation(inputs.evaluation)
    data = evaluation if inputs.calibration is None else context.calibration(inputs.calibration)
    module = context.compressed(inputs.checkpoint, model)
    outputs = model_outputs(model, module, data.batches, device=context.device, progress=progress)
    reference = table_matrix(context.artifacts.table(inputs.baseline, "outputs.parquet"), "output")
    info = {
        "nmse": output_nmse(outputs, torch.from_numpy(reference.copy())),
        "nmse_data": "evaluation" if inputs.calibration is None else "calibration",
        "name": evaluation.metric_name,
        "metrics": measure(evaluation, outputs, module),
    }
    return {"metrics.json": json_bytes(info)}


STEP = Step("evaluate", 2, NoParams, Inputs, run)
