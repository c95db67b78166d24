"""Step ``reconstruct``: the codes, scales and biases of one block's layers, optimised together after their rounding."""

from __future__ import annotations

from dataclasses import asdict, replace

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.fitting.hessian_fit import LayerSearch
from mlorq.models.layers import Layer, LayerList
from mlorq.rounding.reconstruction import ReconstructionSettings, reconstruct
from mlorq.rounding.trainable import Trained
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.candidates import quantizer_params, settings_of
from steps.context import Workbench

SETTINGS = {
    "block": ("iterations", "code_rate", "scale_rate", "bias_rate", "loss", "drop"),
    "brecq": ("iterations", "soft_rate", "soft_weight"),
    "qdrop": ("iterations", "soft_rate", "soft_weight"),
}
QDROP = 0.5  # the published share


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
    params = {
        "block": block,
        "samples": rounding.samples,
        "batch_size": rounding.batch_size,
        "seed": bench.config.seed,
        "method": rounding.method,
        **{name: getattr(rounding, name) for name in SETTINGS[rounding.method]},
        **({} if rounding.method == "block" else quantizer_params(bench.config.search)),
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
    method = params["method"]
    chosen = {name: params[name] for name in SETTINGS[method]} | ({"drop": QDROP} if method == "qdrop" else {})
    settings = ReconstructionSettings(**chosen, method=method, seed=params["seed"])
    pairs = [(layer, rounded[name]) for name, layer in own.items()]
    parts = None
    if method != "block":
        candidates = settings_of(params)
        parts = {
            name: LayerSearch.quantized_parts(
                bench.search(layer, spec.artifact("capture"), candidates), rounded[name].candidate
            )
            for name, layer in own.items()
        }
    result = reconstruct(paired, params["block"], pairs, settings, progress, parts, params.get("zero_point", "codes"))
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


STEP = Step("reconstruct", 3, run)
