"""Step ``reconstruct``: the codes, scales and biases of one block's layers, optimised together after their rounding."""

from __future__ import annotations

from dataclasses import asdict, replace

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.config.compose import part
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import FORMS
from mlorq.models.layers import Layer, LayerList
from mlorq.rounding import METHODS
from mlorq.rounding.base import TrainingSettings
from mlorq.rounding.trainable import Trained
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.candidates import fit_params
from steps.context import Workbench


def members(layers: LayerList, block: int) -> list[Layer]:
    """The layers inside a block, in execution order."""
    prefix = f"{layers.blocks[block]}."
    return [layer for layer in layers.layers if layer.name.startswith(prefix)]


def spec(
    bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, block: int, name: str, previous: ArtifactRef
) -> StepSpec:
    """Depends on all layers rounded so far (the block's own among them), the model and the calibration data.

    Args:
        bench: of the run.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        block: index of the block.
        name: of the block, for people.
        previous: the last layer that was rounded.
    """
    rounding = bench.config.rounding
    method = METHODS[rounding.method]
    assert method.blocks is not None
    params = {
        "block": block,
        **part(rounding, TrainingSettings).model_dump(mode="json"),
        "seed": bench.config.seed,
        "method": rounding.method,
        "settings": part(rounding, method.blocks.settings).model_dump(mode="json"),
        **({"fit": fit_params(bench.config.search)} if method.blocks.needs_parts else {}),
    }
    inputs: dict[str, ArtifactRef | str] = {
        **bench.model_inputs,
        "calibration": bench.calibration.key,
        "layers": layers,
        "capture": capture,
        "previous": previous,
        **embeddings.inputs(bench),
    }
    return replace(STEP.spec(params, inputs), layer=name)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    layers = bench.layer_list(spec.artifact("layers"))
    own = {layer.name: layer for layer in members(layers, params["block"])}
    previous = spec.artifact("previous")
    paired = bench.paired(
        layers,
        spec.artifact("capture"),
        previous,
        params["samples"],
        params["batch_size"],
        spec.optional_artifact("embeddings"),
    )
    rounded = bench.all_rounded(previous, own)
    blocks = METHODS[params["method"]].blocks
    assert blocks is not None
    pairs = [(layer, rounded[name]) for name, layer in own.items()]
    parts = None
    if blocks.needs_parts:
        settings = FitSettings.model_validate(params["fit"])
        parts = {}
        for name, layer in own.items():
            _, plain = bench.fits(layer, spec.artifact("capture"), settings)
            candidate = rounded[name].candidate
            found = FORMS[candidate.form].fit(plain, candidate)
            parts[name] = {key: (one.values, one.quantizer) for key, one in found.items()}
    result = blocks.reconstruct(
        paired,
        params["block"],
        pairs,
        blocks.settings.model_validate(params["settings"]),
        seed=params["seed"],
        parts=parts,
        progress=progress,
    )
    for compressed in result.layers:
        paired.set(own[compressed.layer], compressed)
    bench.keep_paired(paired, spec.ref, params["samples"], params["batch_size"])
    return trained_files(result, previous)


def trained_files(result: Trained, previous: ArtifactRef) -> dict[str, bytes]:
    """What ``Workbench.rounded`` reads: trained layers, and the artifact whose layers they were."""
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


STEP = Step("reconstruct", 4, run)
