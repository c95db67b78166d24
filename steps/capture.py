"""Step ``capture``: statistics of the calibration data (docs/METHOD.md, sections 3 and 7).

Output: ``reference.parquet`` (f(x) of every sample), ``activations/<layer>.parquet`` (a bounded random sample of the
layer's inputs), ``moments/<layer>.safetensors`` (the label-free Hessian and, if the metric needs them, moments of
inputs and output gradients in two folds) and, with ``search.token_weights``, ``importance.safetensors`` (weights of all
tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import torch

from mlorq.artifacts.schemas import matrix_table
from mlorq.artifacts.store import ArtifactRef, table_bytes, tensors_bytes
from mlorq.calibration.collect import capture
from mlorq.calibration.covariance import OuterProducts, moments_tensors
from mlorq.calibration.label_free_hessian import Mode, label_free_hessian
from mlorq.calibration.token_importance import PASSES, importance_tensors, token_importance
from mlorq.costs.measured import spread_batches
from steps.artifacts import IMPORTANCE, moments_file
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session

ACTIVATION_ROWS = 256


@dataclass(frozen=True)
class Params:
    """Settings of the statistics.

    Attributes:
        rows: number of input tokens kept per layer.
        samples: number of calibration samples for the label-free Hessian.
        probes, min_probes, tolerance, mode: of its estimate (``mlorq.calibration.label_free_hessian``).
        moments: whether moments of inputs and output gradients are accumulated.
        token_weights: exponent of the tokens' weights in the moments; False: equal weights.
        seed: for the choice of rows, and for the probes.
    """

    rows: int
    samples: int
    probes: int
    min_probes: int
    tolerance: float
    mode: Mode
    moments: bool
    token_weights: bool | float
    seed: int


@dataclass(frozen=True)
class Inputs:
    """The model, the calibration data, and the ``layers`` artifact."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef


def spec(session: Session, model: ModelRef, layers: ArtifactRef) -> StepSpec:
    """Depends on the model, the calibration data, the layers and the Hessian's settings."""
    search = session.config.search
    moments = search.metric == "moments"
    params = Params(
        rows=ACTIVATION_ROWS,
        samples=search.hessian_samples,
        probes=search.hessian_probes,
        min_probes=search.hessian_min_probes,
        tolerance=search.hessian_tolerance,
        mode=search.hessian_mode,
        moments=moments,
        token_weights=moments and search.token_weights,
        seed=session.config.seed,
    )
    return STEP.spec(params, Inputs(model, session.calibration_ref, layers))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    model = context.model(inputs.model)
    listed = context.artifacts.layers(inputs.layers)
    layers = listed.layers
    batches = listed.batches(context.calibration(inputs.calibration).batches)
    hessian_batches = spread_batches(batches, params.samples)
    # One unit of progress per pass; a backward pass costs about two forwards.
    weighing = (1 + PASSES) * len(batches) if params.token_weights else 0
    before = weighing + len(batches)
    unknown = before + len(hessian_batches) * params.probes
    progress(0, unknown)
    importance = None
    if params.token_weights:
        importance = token_importance(
            model,
            layers,
            listed.blocks,
            batches,
            power=float(params.token_weights),
            seed=params.seed,
            alone=listed.alone,
            device=context.device,
            progress=lambda done, _: progress((1 + PASSES) * done, unknown),
        )
    captured = capture(
        model,
        layers,
        batches,
        rows=params.rows,
        seed=params.seed,
        moments=params.moments,
        importance=importance,
        alone=listed.alone,
        device=context.device,
        progress=lambda done, _: progress(weighing + done, unknown),
    )
    gradients = {
        layer.name: OuterProducts(layer.out_features, context.device)
        for layer in layers
        if layer.name in captured.inputs
    }
    hessian = label_free_hessian(
        model,
        layers,
        hessian_batches,
        probes=params.probes,
        min_probes=params.min_probes,
        tolerance=params.tolerance,
        mode=params.mode,
        seed=params.seed,
        gradients=gradients,
        alone=listed.alone,
        device=context.device,
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


STEP = Step("capture", 4, Params, Inputs, run)
