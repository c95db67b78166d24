"""Step ``reconstruct``: joint training of one block's codes, scales, biases and norms (docs/METHOD.md, 7 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.config.compose import part
from mlorq.fitting.settings import FitSettings
from mlorq.models.layer_list import Layer, LayerList
from mlorq.rounding import METHODS
from mlorq.rounding.base import RoundingTask, TrainingSettings
from mlorq.rounding.trainable import Trained
from steps.artifacts import REST
from steps.base import Progress, Step, StepSpec
from steps.candidates import fits_of
from steps.context import Context
from steps.handles import ModelRef
from steps.paired_cache import TrainingInputs
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """How a block is reconstructed.

    Attributes:
        block: index of the block.
        training: number of samples and batch size.
        seed: for every random choice.
        method: as ``rounding.method``.
        settings: the settings of the ``rounding`` section that the method reads.
        fit: of the candidates' matrices; None for a method that starts from codes alone.
    """

    block: int
    training: TrainingSettings
    seed: int
    method: str
    settings: Mapping[str, Any]
    fit: FitSettings | None = None


def members(layers: LayerList, block: int) -> list[Layer]:
    """The layers inside a block, in execution order."""
    prefix = f"{layers.blocks[block]}."
    return [layer for layer in layers.layers if layer.name.startswith(prefix)]


def spec(
    session: Session,
    model: ModelRef,
    capture: ArtifactRef,
    layers: ArtifactRef,
    block: int,
    name: str,
    previous: ArtifactRef,
    tables: ArtifactRef | None,
) -> StepSpec:
    """Depends on all layers rounded so far (including the block's), the model and the calibration data.

    Args:
        session: of the run.
        model: the model to compress.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        block: index of the block.
        name: display name of the block.
        previous: artifact of the last rounded layer.
        tables: the ``embeddings`` artifact; None: tables stay float.
    """
    rounding = session.config.rounding
    blocks = METHODS[rounding.method].blocks
    assert blocks is not None
    params = Params(
        block,
        part(rounding, TrainingSettings),
        session.config.seed,
        rounding.method,
        part(rounding, blocks.settings).model_dump(mode="json"),
        session.config.search.fit if blocks.needs_parts else None,
    )
    inputs = TrainingInputs(model, session.calibration_ref, layers, capture, previous, tables)
    return STEP.spec(params, inputs, label=name)


def run(params: Params, inputs: TrainingInputs, context: Context, progress: Progress) -> dict[str, bytes]:
    layers = context.artifacts.layers(inputs.layers)
    own = {layer.name: layer for layer in members(layers, params.block)}
    state = inputs.state(params.training)
    paired = context.paired.get(state, inputs.previous)
    rounded = context.artifacts.all_rounded(inputs.previous, own).layers
    blocks = METHODS[params.method].blocks
    assert blocks is not None
    parts = None
    if params.fit is not None:
        parts = {}
        for name, layer in own.items():
            fit = fits_of(context, inputs.model, inputs.capture, layer, params.fit).hessian
            parts[name] = RoundingTask(name, rounded[name].candidate, fit, fit.output_metric).parts()
    result = blocks.reconstruct(
        paired,
        params.block,
        [(layer, rounded[name]) for name, layer in own.items()],
        blocks.settings.model_validate(params.settings),
        seed=params.seed,
        parts=parts,
        progress=progress,
    )
    for compressed in result.layers:
        paired.set(own[compressed.layer], compressed)
    paired.set_rest(result.rest)
    context.paired.keep(paired, state, STEP.ref(params, inputs))
    return trained_files(result, inputs.previous)


def trained_files(result: Trained, previous: ArtifactRef) -> dict[str, bytes]:
    """Files of trained layers and norms for ``ArtifactReader.rounded``; ``previous``: the artifact before training."""
    files = {f"{layer.layer}.safetensors": tensors_bytes(layer.tensors()) for layer in result.layers}
    if result.rest:
        files[REST] = tensors_bytes(result.rest)
    files["block.json"] = json_bytes(
        {
            "layers": [
                {"layer": compressed.layer, "candidate": asdict(compressed.candidate)} for compressed in result.layers
            ],
            "rest": sorted(result.rest),
            "previous": previous.to_json(),
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "iterations": result.iterations,
        }
    )
    return files


STEP = Step("reconstruct", 6, Params, TrainingInputs, run)
