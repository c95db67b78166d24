"""Step ``reconstruct``: the codes, scales and biases of one block's layers, optimised together after their rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.fitting.hessian_fit import CandidateSettings, LayerSearch
from mlorq.models.layers import Layer, LayerList
from mlorq.rounding.reconstruction import ReconstructionSettings, reconstruct
from mlorq.rounding.trainable import Trained
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.candidates import fit_settings_of, search_of
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.paired_cache import PairedState
from steps.session import Session

SETTINGS = {
    "block": ("iterations", "code_rate", "scale_rate", "bias_rate", "loss", "drop"),
    "brecq": ("iterations", "soft_rate", "soft_weight"),
    "qdrop": ("iterations", "soft_rate", "soft_weight"),
}
QDROP = 0.5  # the published share


@dataclass(frozen=True)
class Params:
    """How a block is reconstructed.

    Attributes:
        block: its index.
        samples: most calibration samples used.
        batch_size: samples per step.
        seed: of every random choice.
        method: as ``rounding.method``.
        settings: what the method reads of the ``rounding`` section.
        fit: what decides the candidates' matrices; None for a method that starts from codes alone.
    """

    block: int
    samples: int
    batch_size: int
    seed: int
    method: str
    settings: Mapping[str, Any]
    fit: CandidateSettings | None = None


@dataclass(frozen=True)
class Inputs:
    """The model, the data, and the last layer that was rounded."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    previous: ArtifactRef
    embeddings: ArtifactRef | None = None


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
) -> StepSpec:
    """Depends on all layers rounded so far (the block's own among them), the model and the calibration data.

    Args:
        session: of the run.
        model: that is compressed.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        block: index of the block.
        name: of the block, for people.
        previous: the last layer that was rounded.
    """
    rounding = session.config.rounding
    params = Params(
        block,
        rounding.samples,
        rounding.batch_size,
        session.config.seed,
        rounding.method,
        {name: getattr(rounding, name) for name in SETTINGS[rounding.method]},
        None if rounding.method == "block" else fit_settings_of(session.config.search),
    )
    inputs = Inputs(model, session.calibration_ref, layers, capture, previous, embeddings.artifact(session))
    return STEP.spec(params, inputs, label=name)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    layers = context.artifacts.layers(inputs.layers)
    own = {layer.name: layer for layer in members(layers, params.block)}
    state = PairedState(
        inputs.model,
        inputs.calibration,
        inputs.layers,
        inputs.capture,
        inputs.embeddings,
        params.samples,
        params.batch_size,
    )
    paired = context.paired.get(state, inputs.previous)
    rounded = context.artifacts.all_rounded(inputs.previous, own)
    chosen: dict[str, Any] = dict(params.settings) | ({"drop": QDROP} if params.method == "qdrop" else {})
    settings = ReconstructionSettings(**chosen, method=params.method, seed=params.seed)  # type: ignore[arg-type]
    pairs = [(layer, rounded[name]) for name, layer in own.items()]
    parts, fit = None, params.fit
    if fit is not None:
        parts = {
            name: LayerSearch.quantized_parts(
                search_of(context, inputs.model, inputs.capture, layer, fit), rounded[name].candidate
            )
            for name, layer in own.items()
        }
    zero_point = "codes" if fit is None else fit.zero_point
    result = reconstruct(paired, params.block, pairs, settings, progress, parts, zero_point)
    for compressed in result.layers:
        paired.set(own[compressed.layer], compressed)
    context.paired.keep(paired, state, STEP.ref(params, inputs))
    return trained_files(result, inputs.previous)


def trained_files(result: Trained, previous: ArtifactRef) -> dict[str, bytes]:
    """What ``ArtifactReader.rounded`` reads: trained layers, and the artifact whose layers they were."""
    files = {f"{layer.layer}.safetensors": tensors_bytes(layer.tensors()) for layer in result.layers}
    files["block.json"] = json_bytes(
        {
            "layers": [
                {"layer": compressed.layer, "candidate": asdict(compressed.candidate)} for compressed in result.layers
            ],
            "previous": previous.to_json(),
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "iterations": result.iterations,
        }
    )
    return files


STEP = Step("reconstruct", 4, Params, Inputs, run)
