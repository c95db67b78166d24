"""Step ``tune``: the codes, scales and biases of all layers, trained together after the last block."""

from __future__ import annotations

from dataclasses import dataclass

from mlorq.artifacts.store import ArtifactRef
from mlorq.rounding.finetune import TuningSettings, tune
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.paired_cache import PairedState, rounding_batches
from steps.reconstruct import trained_files
from steps.session import Session

SETTINGS = ("tuning", "tuning_rate", "scale_rate", "bias_rate")


@dataclass(frozen=True)
class Params:
    """Most calibration samples used, samples per step, and the training's settings."""

    samples: int
    batch_size: int
    settings: TuningSettings


@dataclass(frozen=True)
class Inputs:
    """The model, the data, and the last artifact of the rounded layers."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    previous: ArtifactRef
    embeddings: ArtifactRef | None = None


def spec(
    session: Session, model: ModelRef, capture: ArtifactRef, layers: ArtifactRef, previous: ArtifactRef
) -> StepSpec:
    """Depends on all rounded layers, the model and the calibration data.

    Args:
        session: of the run.
        model: that is compressed.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        previous: the last artifact of the rounded layers.
    """
    rounding = session.config.rounding
    chosen = {name: getattr(rounding, name) for name in SETTINGS}
    params = Params(rounding.samples, rounding.batch_size, TuningSettings(**chosen, seed=session.config.seed))
    inputs = Inputs(model, session.calibration_ref, layers, capture, previous, embeddings.artifact(session))
    return STEP.spec(params, inputs)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    listed = context.artifacts.layers(inputs.layers)
    rounded = context.artifacts.all_rounded(inputs.previous)
    state = PairedState(
        inputs.model,
        inputs.calibration,
        inputs.layers,
        inputs.capture,
        inputs.embeddings,
        params.samples,
        params.batch_size,
    )
    batches, importance = rounding_batches(context, state)
    result = tune(
        context.model(inputs.model),
        listed.blocks,
        [(layer, rounded[layer.name]) for layer in listed.layers],
        batches,
        params.settings,
        context.device,
        progress,
        importance=importance,
        activations=context.plan(inputs.model),
        tables=context.artifacts.tables(inputs.embeddings),
    )
    return trained_files(result, inputs.previous)


STEP = Step("tune", 2, Params, Inputs, run)
