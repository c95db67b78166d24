"""Step ``evaluate``: the compressed model, as loaded from its checkpoint, on the evaluation data."""

from __future__ import annotations

import torch

from mlorq.artifacts.schemas import table_matrix
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.checkpoint.io import load
from mlorq.evaluation.outputs import model_outputs, output_nmse
from steps.base import Progress, Step, StepSpec
from steps.baseline import measure, nmse_data
from steps.context import Workbench, reachable_checkpoint


def spec(bench: Workbench, checkpoint: ArtifactRef, float_evaluation: ArtifactRef) -> StepSpec:
    """Depends on the checkpoint, the evaluation data, and the float model's outputs there."""
    return STEP.spec({}, {"checkpoint": checkpoint, "baseline": float_evaluation, "evaluation": bench.evaluation.key})


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    model = bench.float_model
    # Loaded into a copy of the float model's structure only where the architecture alone cannot rebuild it.
    instance = None if model.rebuilds else model.module
    with reachable_checkpoint(bench.store, spec.artifact("checkpoint")) as location:
        module = load(location, model=instance, device=bench.device)
    outputs = model_outputs(model, module, nmse_data(bench).batches, device=bench.device, progress=progress)
    reference = table_matrix(bench.store.read_table(spec.artifact("baseline"), "outputs.parquet"), "output")
    info = {
        "nmse": output_nmse(outputs, torch.from_numpy(reference.copy())),
        "nmse_data": "evaluation" if bench.evaluation.batches else "calibration",
        "name": bench.evaluation.metric_name,
        "metrics": measure(bench.evaluation, outputs, module),
    }
    return {"metrics.json": json_bytes(info)}


STEP = Step("evaluate", 1, run)
