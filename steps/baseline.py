"""Step ``baseline``: the float model on the evaluation data: its metric, and its outputs to compare others with."""

from __future__ import annotations

import pyarrow as pa
import torch

from mlorq.artifacts.schemas import matrix_table
from mlorq.artifacts.store import json_bytes, table_bytes
from mlorq.data.base import Dataset
from mlorq.evaluation.outputs import model_outputs
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def spec(bench: Workbench) -> StepSpec:
    """Depends on the model and the evaluation data."""
    inputs = {"model": bench.float_model.key, "evaluation": bench.evaluation.key, "nmse": nmse_data(bench).key}
    return STEP.spec({}, dict(inputs))


def nmse_data(bench: Workbench) -> Dataset:
    """Where the output NMSE is measured: the evaluation data, or calibration data where that gives no batches."""
    return bench.evaluation if bench.evaluation.batches else bench.calibration


def measure(data: Dataset, outputs: torch.Tensor, module: torch.nn.Module) -> dict[str, float]:
    """Metrics of a module by name: the data set's own, or what the user's function returns."""
    if data.evaluate is not None:
        return {name: float(value) for name, value in data.evaluate(module).items()}
    return {} if data.metric is None else data.metric(outputs)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    model = bench.float_model
    outputs = model_outputs(model, model.module, nmse_data(bench).batches, device=bench.device, progress=progress)
    metrics = measure(bench.evaluation, outputs, model.module)
    index = {"sample": torch.arange(outputs.shape[0])}
    return {
        "outputs.parquet": table_bytes(matrix_table(outputs, "output", index, pa.float32())),
        "metrics.json": json_bytes({"name": bench.evaluation.metric_name, "metrics": metrics}),
    }


STEP = Step("baseline", 1, run)
