"""Step ``tune``: joint training of all codes, scales, biases and norms after the last block (docs/METHOD.md, 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlorq.artifacts.store import ArtifactRef
from mlorq.config.compose import part
from mlorq.rounding import METHODS
from mlorq.rounding.base import TrainingSettings
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import ModelRef
from steps.paired_cache import TrainingInputs, rounding_batches
from steps.reconstruct import trained_files
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """How all layers are trained together.

    Attributes:
        training: number of samples and batch size.
        seed: for their order.
        method: as ``rounding.method``.
        settings: the settings of the ``rounding`` section that the method reads.
    """

    training: TrainingSettings
    seed: int
    method: str
    settings: Mapping[str, Any]


def spec(
    session: Session,
    model: ModelRef,
    capture: ArtifactRef,
    layers: ArtifactRef,
    previous: ArtifactRef,
    tables: ArtifactRef | None,
) -> StepSpec:
    """Depends on all rounded layers, the model and the calibration data.

    Args:
        session: of the run.
        model: the model to compress.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        previous: the last artifact of the rounded layers.
        tables: the ``embeddings`` artifact; None: tables stay float.
    """
    rounding = session.config.rounding
    tuning = METHODS[rounding.method].tuning
    assert tuning is not None
    settings = part(rounding, tuning.settings).model_dump(mode="json")
    params = Params(part(rounding, TrainingSettings), session.config.seed, rounding.method, settings)
    inputs = TrainingInputs(model, session.calibration_ref, layers, capture, previous, tables)
    return STEP.spec(params, inputs)


def run(params: Params, inputs: TrainingInputs, context: Context, progress: Progress) -> dict[str, bytes]:
    listed = context.artifacts.layers(inputs.layers)
    rounded = context.artifacts.all_rounded(inputs.previous)
    state = inputs.state(params.training)
    batches, importance = rounding_batches(context, state)
    tuning = METHODS[params.method].tuning
    assert tuning is not None
    result = tuning.tune(
        context.model(inputs.model),
        listed.blocks,
        [(layer, rounded.layers[layer.name]) for layer in listed.layers],
        batches,
        tuning.settings.model_validate(params.settings),
        seed=params.seed,
        device=context.device,
        progress=progress,
        importance=importance,
        activations=context.plan(inputs.model),
        tables=context.artifacts.tables(inputs.embeddings),
        rest=rounded.rest,
    )
    return trained_files(result, inputs.previous)


STEP = Step("tune", 3, Params, TrainingInputs, run)
