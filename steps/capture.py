"""Step ``capture``: one pass over the calibration data.

Output: ``reference.parquet`` (f(x) of every sample), ``activations/<layer>.parquet`` (a bounded random sample of the
layer's inputs) and ``moments/<layer>.safetensors`` (the label-free Hessian and, where the metric needs them, second
moments of inputs and output gradients in two folds).
"""

from __future__ import annotations

import pyarrow as pa
import torch

from mlorq.capture import capture
from mlorq.hessian import label_free_hessian
from mlorq.second_moments import OuterProducts, moments_tensors
from mlorq.store import ArtifactRef, table_bytes, tensors_bytes
from mlorq.tables import matrix_table
from steps.base import Progress, Step, StepSpec
from steps.workbench import Workbench, moments_file

ACTIVATION_ROWS = 256


def spec(bench: Workbench, layers: ArtifactRef) -> StepSpec:
    """Depends on the model, the calibration data, the layers and the Hessian's settings."""
    search = bench.config.search
    params = {
        "rows": ACTIVATION_ROWS,
        "samples": search.hessian_samples,
        "probes": search.hessian_probes,
        "min_probes": search.hessian_min_probes,
        "tolerance": search.hessian_tolerance,
        "mode": search.hessian_mode,
        "moments": search.metric == "moments",
        "seed": bench.config.seed,
    }
    inputs: dict[str, ArtifactRef | str] = {
        "model": bench.model.key,
        "calibration": bench.calibration.key,
        "layers": layers,
    }
    return STEP.spec(params, inputs)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    layers = bench.layer_list(spec.artifact("layers")).layers
    hessian_batches = bench.batches(params["samples"])
    batches = bench.calibration.batches
    # One unit of progress a pass; a backward pass costs about two forwards.
    unknown = len(batches) + len(hessian_batches) * params["probes"]
    progress(0, unknown)
    captured = capture(
        bench.model,
        layers,
        batches,
        rows=params["rows"],
        seed=params["seed"],
        moments=params["moments"],
        device=bench.device,
        progress=lambda done, _: progress(done, unknown),
    )
    gradients = {
        layer.name: OuterProducts(layer.out_features, bench.device) for layer in layers if layer.name in captured.inputs
    }
    hessian = label_free_hessian(
        bench.model,
        layers,
        hessian_batches,
        probes=params["probes"],
        min_probes=params["min_probes"],
        tolerance=params["tolerance"],
        mode=params["mode"],
        seed=params["seed"],
        gradients=gradients,
        device=bench.device,
        progress=lambda done, total: progress(len(batches) + done, len(batches) + total),
    )
    index = {"sample": torch.arange(captured.reference.shape[0])}
    files = {"reference.parquet": table_bytes(matrix_table(captured.reference, "output", index, pa.float32()))}
    for layer in layers:
        kept = captured.samples[layer.name]
        table = matrix_table(kept.x, "x", {"sample": kept.sample, "token": kept.token}, pa.float16())
        files[f"activations/{layer.name}.parquet"] = table_bytes(table)
        tensors = {"hessian": hessian[layer.name]}
        if layer.name in gradients:
            tensors |= moments_tensors(captured.inputs[layer.name], gradients[layer.name])
        files[moments_file(layer.name)] = tensors_bytes(tensors)
    return files


STEP = Step("capture", 2, run)
