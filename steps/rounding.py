"""Step ``round``: the codes of one layer. Methods that look at inputs see the layers before it rounded already."""

from __future__ import annotations

from dataclasses import asdict

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.forms.base import Candidate
from mlorq.models.layers import Layer
from mlorq.rounding import BY_BLOCKS, METHODS, NEEDS_MOMENTS, RoundingSettings
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.candidates import quantizer_params, settings_of
from steps.context import Workbench

LRA = ("iterations", "learning_rate", "regularisation", "beta_start", "beta_end", "warm_up", "stop_loss", "start")
# What a method reads of the configuration's rounding section: nothing else is in a layer's key.
SETTINGS = {
    "lra": ("samples", *LRA),
    "gptq": ("samples",),
    "closed_form": ("samples", "feedback"),
    "block": ("samples", "batch_size", "feedback"),
    "erq": ("samples",),
    "brecq": (),
    "qdrop": (),
}


def is_sequential(method: str) -> bool:
    """Whether a method must round layers in execution order."""
    return method in NEEDS_MOMENTS | BY_BLOCKS


def spec(
    bench: Workbench,
    capture: ArtifactRef,
    layers: ArtifactRef,
    layer: Layer,
    candidate: Candidate,
    previous: ArtifactRef | None,
) -> StepSpec:
    """Depends on the candidate, the layer before it (for sequential methods), the model and the calibration data.

    Not on the allocation's key: another budget that chooses the same candidates so far reuses what is rounded.
    """
    config = bench.config
    method = config.rounding.method
    params = {
        "layer": layer.name,
        "candidate": asdict(candidate),
        "method": method,
        **quantizer_params(config.search),
    }
    inputs: dict[str, ArtifactRef | str] = {**bench.model_inputs, "layers": layers, "capture": capture}
    if is_sequential(method):
        params |= {"settings": {name: getattr(config.rounding, name) for name in SETTINGS[method]}}
        inputs |= {"calibration": bench.calibration.key, **embeddings.inputs(bench)}
        if previous is not None:
            inputs["previous"] = previous
    return STEP.spec(params, inputs, layer)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    method = params["method"]
    layers = bench.layer_list(spec.artifact("layers"))
    layer = layers[params["layer"]]
    candidate = Candidate(**params["candidate"])
    search = bench.search(layer, spec.artifact("capture"), settings_of(params))
    previous = spec.artifact("previous") if "previous" in spec.inputs else None
    if method not in NEEDS_MOMENTS:
        result = METHODS[method](layer.name, search, candidate, None, RoundingSettings(method), progress)
    else:
        settings = dict(params["settings"])
        samples, batch_size = settings.pop("samples"), settings.pop("batch_size", None)
        feedback = settings.pop("feedback", True)
        paired = bench.paired(
            layers, spec.artifact("capture"), previous, samples, batch_size, spec.optional_artifact("embeddings")
        )
        moments = paired.moments(layer) if layer.groups == 1 else None
        # A grouped convolution's rows see different inputs: rounded to nearest.
        used = method if moments is not None else "nearest"
        if used in ("closed_form", "block") and not feedback:
            used = "gptq"
        result = METHODS[used](
            layer.name, search, candidate, moments, RoundingSettings(used, **settings), progress, bench.bias(layer)
        )
        paired.set(layer, result.layer)
        bench.keep_paired(paired, spec.ref, samples, batch_size)
    info = {
        "layer": layer.name,
        "candidate": asdict(candidate),
        "previous": None if previous is None else previous.to_json(),
        "method": method,
        "error_before": result.error_before,
        "error_after": result.error_after,
        "iterations": result.iterations,
    }
    return {"codes.safetensors": tensors_bytes(result.layer.tensors()), "layer.json": json_bytes(info)}


STEP = Step("round", 5, run)
