"""Step ``tune``: the codes, scales and biases of all layers, trained together after the last block."""

from __future__ import annotations

from mlorq.artifacts.store import ArtifactRef
from mlorq.config.compose import part
from mlorq.rounding import METHODS
from mlorq.rounding.base import TrainingSettings
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench
from steps.reconstruct import trained_files


def spec(bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, previous: ArtifactRef) -> StepSpec:
    """Depends on all rounded layers, the model and the calibration data.

    Args:
        bench: of the run.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        previous: the last artifact of the rounded layers.
    """
    rounding = bench.config.rounding
    tuning = METHODS[rounding.method].tuning
    assert tuning is not None
    params = {
        **part(rounding, TrainingSettings).model_dump(mode="json"),
        "seed": bench.config.seed,
        "method": rounding.method,
        "settings": part(rounding, tuning.settings).model_dump(mode="json"),
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
    tuning = METHODS[params["method"]].tuning
    assert tuning is not None
    pairs = [(layer, rounded[layer.name]) for layer in listed.layers]
    tables = bench.tables(spec.optional_artifact("embeddings"))
    result = tuning.tune(
        bench.model,
        listed.blocks,
        pairs,
        batches,
        tuning.settings.model_validate(params["settings"]),
        seed=params["seed"],
        device=bench.device,
        progress=progress,
        importance=importance,
        activations=bench.plan,
        tables=tables,
    )
    return trained_files(result, previous)


STEP = Step("tune", 2, run)
