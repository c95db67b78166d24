"""Step ``baseline``: metric and outputs of the float model on the evaluation data."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import torch

from mlorq.artifacts.schemas import matrix_table
from mlorq.artifacts.store import json_bytes, table_bytes
from mlorq.data.base import Dataset
from mlorq.evaluation.outputs import model_outputs
from steps.base import NoParams, Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Inputs:
    """The model as given, and the data; calibration data only if the evaluation data has no batches."""

    model: ModelRef
    evaluation: DataRef
    calibration: DataRef | None = None


def spec(session: Session) -> StepSpec:
    """Depends on the model and the evaluation data."""
    return STEP.spec(NoParams(), Inputs(session.model_ref, session.evaluation_ref, stand_in(session)))


def stand_in(session: Session) -> DataRef | None:
    """The calibration data if the evaluation data has no batches to measure the output NMSE on, else None."""
    return None if session.evaluation.batches else session.calibration_ref


def nmse_data(session: Session) -> Dataset:
    """Data for the output NMSE: the evaluation data, or the calibration data if that has no batches."""
    return session.evaluation if session.evaluation.batches else session.calibration


def measure(data: Dataset, outputs: torch.Tensor, module: torch.nn.Module) -> dict[str, float]:
    """Metrics of a module by name: those of the data set, or of the user's ``evaluate`` function."""
    if data.evaluate is not None:
        return {name: float(value) for name, value in data.evaluate(module).items()}
    return {} if data.metric is None else data.metric(outputs)


def run(params: NoParams, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    model, evaluation = context.model(inputs.model), context.evaluation(inputs.evaluation)
    data = evaluation if inputs.calibration is None else context.calibration(inputs.calibration)
    outputs = model_outputs(model, model.module, data.batches, device=context.device, progress=progress)
    metrics = measure(evaluation, outputs, model.module)
    index = {"sample": torch.arange(outputs.shape[0])}
    return {
        "outputs.parquet": table_bytes(matrix_table(outputs, "output", index, pa.float32())),
        "metrics.json": json_bytes({"name": evaluation.metric_name, "metrics": metrics}),
    }


STEP = Step("baseline", 3, NoParams, Inputs, run)
