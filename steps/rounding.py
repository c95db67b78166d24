"""Step ``round``: the codes of one layer. Methods that look at inputs see the layers before it rounded already."""

from __future__ import annotations

from dataclasses import asdict, replace

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.config.compose import part
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import Candidate
from mlorq.models.layers import Layer
from mlorq.rounding import METHODS, RoundingTask
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.candidates import fit_params
from steps.context import Workbench


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
    method = METHODS[config.rounding.method]
    params = {
        "layer": layer.name,
        "candidate": asdict(candidate),
        "method": method.name,
        "fit": fit_params(config.search),
    }
    inputs: dict[str, ArtifactRef | str] = {**bench.model_inputs, "layers": layers, "capture": capture}
    if method.sequential:
        params |= {"settings": part(config.rounding, method.layer_settings).model_dump(mode="json")}
        inputs |= {"calibration": bench.calibration.key, **embeddings.inputs(bench)}
        if previous is not None:
            inputs["previous"] = previous
    return STEP.spec(params, inputs, layer)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    method = METHODS[params["method"]]
    settings = method.layer_settings.model_validate(params.get("settings", {}))
    layers = bench.layer_list(spec.artifact("layers"))
    layer = layers[params["layer"]]
    candidate = Candidate(**params["candidate"])
    fit, plain = bench.fits(layer, spec.artifact("capture"), FitSettings.model_validate(params["fit"]))
    task = RoundingTask(layer.name, candidate, plain, fit.output_metric, bias=bench.bias(layer))
    previous = spec.artifact("previous") if "previous" in spec.inputs else None
    if not method.needs_inputs:
        result = method.round(task, settings, progress)
    else:
        samples, batch_size = settings.samples, getattr(settings, "batch_size", None)
        paired = bench.paired(
            layers, spec.artifact("capture"), previous, samples, batch_size, spec.optional_artifact("embeddings")
        )
        # A grouped convolution's rows see different inputs: methods round it to nearest.
        moments = paired.moments(layer) if layer.groups == 1 else None
        result = method.round(replace(task, moments=moments), settings, progress)
        paired.set(layer, result.layer)
        bench.keep_paired(paired, spec.ref, samples, batch_size)
    info = {
        "layer": layer.name,
        "candidate": asdict(candidate),
        "previous": None if previous is None else previous.to_json(),
        "method": method.name,
        "error_before": result.error_before,
        "error_after": result.error_after,
        "iterations": result.iterations,
    }
    return {"codes.safetensors": tensors_bytes(result.layer.tensors()), "layer.json": json_bytes(info)}


STEP = Step("round", 6, run)
