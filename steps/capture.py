"""Step ``capture``: one pass over the calibration data.

Output: ``reference.parquet`` (f(x) of every sample), ``activations/<layer>.parquet`` (a bounded random sample of the
layer's inputs), ``moments/<layer>.safetensors`` (the label-free Hessian and, where the metric needs them, moments of
inputs and output gradients in two folds) and, where asked for, ``importance.safetensors`` (weights of all tokens).
"""

from __future__ import annotations

import pyarrow as pa
import torch

from mlorq.artifacts.schemas import matrix_table
from mlorq.artifacts.store import ArtifactRef, table_bytes, tensors_bytes
from mlorq.calibration.collect import capture
from mlorq.calibration.covariance import OuterProducts, moments_tensors
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.calibration.token_importance import PASSES, importance_tensors, token_importance
from steps.base import Progress, Step, StepSpec
from steps.context import IMPORTANCE, Workbench, moments_file

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
        "token_weights": search.metric == "moments" and search.token_weights,
        "seed": bench.config.seed,
    }
    inputs: dict[str, ArtifactRef | str] = {
        **bench.model_inputs,
        "calibration": bench.calibration.key,
        "layers": layers,
    }
    return STEP.spec(params, inputs)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    listed = bench.layer_list(spec.artifact("layers"))
    layers = listed.layers
    hessian_batches = bench.batches(params["samples"])
    batches = bench.calibration.batches
    # One unit of progress a pass; a backward pass costs about two forwards.
    weighing = (1 + PASSES) * len(batches) if params["token_weights"] else 0
    before = weighing + len(batches)
    unknown = before + len(hessian_batches) * params["probes"]
    progress(0, unknown)
    importance = None
    if params["token_weights"]:
        importance = token_importance(
            bench.model,
            layers,
            listed.blocks,
            batches,
            power=float(params["token_weights"]),
            seed=params["seed"],
            device=bench.device,
            progress=lambda done, _: progress((1 + PASSES) * done, unknown),
        )
    captured = capture(
        bench.model,
        layers,
        batches,
        rows=params["rows"],
        seed=params["seed"],
        moments=params["moments"],
        importance=importance,
        device=bench.device,
        progress=lambda done, _: progress(weighing + done, unknown),
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
        progress=lambda done, total: progress(before + done, before + total),
    )
    index = {"sample": torch.arange(captured.reference.shape[0])}
    files = {"reference.parquet": table_bytes(matrix_table(captured.reference, "output", index, pa.float32()))}
    if importance is not None:
        files[IMPORTANCE] = tensors_bytes(importance_tensors(importance))
    for layer in layers:
        kept = captured.samples[layer.name]
        table = matrix_table(kept.x, "x", {"sample": kept.sample, "token": kept.token}, pa.float16())
        files[f"activations/{layer.name}.parquet"] = table_bytes(table)
        tensors = {"hessian": hessian[layer.name]}
        if layer.name in gradients:
            tensors |= moments_tensors(captured.inputs[layer.name], gradients[layer.name])
        files[moments_file(layer.name)] = tensors_bytes(tensors)
    return files


STEP = Step("capture", 4, run)
