"""Step ``tune``: the codes, scales and biases of all layers, trained together after the last block."""

from __future__ import annotations

from mlorq.artifacts.store import ArtifactRef
from mlorq.rounding.finetune import TuningSettings, tune
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench
from steps.reconstruct import trained_files

SETTINGS = ("tuning", "tuning_rate", "scale_rate", "bias_rate")


def spec(bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, previous: ArtifactRef) -> StepSpec:
    """Depends on all rounded layers, the model and the calibration data.

    Args:
        bench: of the run.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        previous: the last artifact of the rounded layers.
    """
    rounding = bench.config.rounding
    params = {
        "samples": rounding.samples,
        "batch_size": rounding.batch_size,
        "seed": bench.config.seed,
        **{name: getattr(rounding, name) for name in SETTINGS},
    }
    inputs: dict[str, ArtifactRef | str] = {
        **bench.model_inputs,
        "calibration": bench.calibration.key,
        "layers": layers,
        "capture": capture,
        "previous": previous,
        **embeddings.inputs(bench),
    }
    return STEP.spec(params, inputs)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    listed = bench.layer_list(spec.artifact("layers"))
    previous = spec.artifact("previous")
    rounded = bench.all_rounded(previous)
    batches, importance = bench.rounding_batches(spec.artifact("capture"), params["samples"], params["batch_size"])
    settings = TuningSettings(**{name: params[name] for name in SETTINGS}, seed=params["seed"])
    pairs = [(layer, rounded[layer.name]) for layer in listed.layers]
    tables = bench.tables(spec.optional_artifact("embeddings"))
    result = tune(
        bench.model,
        listed.blocks,
        pairs,
        batches,
        settings,
        bench.device,
        progress,
        importance=importance,
        activations=bench.plan,
        tables=tables,
    )
    return trained_files(result, previous)


STEP = Step("tune", 1, run)
