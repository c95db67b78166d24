"""Step ``round``: the codes of one layer. Methods that look at inputs see the layers before it rounded already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.fitting.hessian_fit import CandidateSettings
from mlorq.forms.base import Candidate
from mlorq.models.layers import Layer
from mlorq.rounding import BY_BLOCKS, METHODS, NEEDS_MOMENTS, RoundingSettings
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.candidates import fit_settings_of, search_of
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.paired_cache import PairedState
from steps.session import Session

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


@dataclass(frozen=True)
class Params:
    """How a layer is rounded.

    Attributes:
        layer: which.
        candidate: what it becomes.
        method: as ``rounding.method``.
        fit: what decides the candidate's matrices.
        settings: what the method reads of the ``rounding`` section.
    """

    layer: str
    candidate: Candidate
    method: str
    fit: CandidateSettings
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The model and what is known of the layer; of a sequential method also the data and what was rounded before."""

    model: ModelRef
    layers: ArtifactRef
    capture: ArtifactRef
    calibration: DataRef | None = None
    embeddings: ArtifactRef | None = None
    previous: ArtifactRef | None = None


def is_sequential(method: str) -> bool:
    """Whether a method must round layers in execution order."""
    return method in NEEDS_MOMENTS | BY_BLOCKS


def spec(
    session: Session,
    model: ModelRef,
    capture: ArtifactRef,
    layers: ArtifactRef,
    layer: Layer,
    candidate: Candidate,
    previous: ArtifactRef | None,
) -> StepSpec:
    """Depends on the candidate, the layer before it (for sequential methods), the model and the calibration data.

    Not on the allocation's key: another budget that chooses the same candidates so far reuses what is rounded.
    """
    rounding = session.config.rounding
    settings = {name: getattr(rounding, name) for name in SETTINGS.get(rounding.method, ())}
    params = Params(layer.name, candidate, rounding.method, fit_settings_of(session.config.search), settings)
    inputs = Inputs(model, layers, capture)
    if is_sequential(rounding.method):
        tables = embeddings.artifact(session)
        inputs = Inputs(model, layers, capture, session.calibration_ref, tables, previous)
    return STEP.spec(params, inputs, layer)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    method = params.method
    layer = context.artifacts.layers(inputs.layers)[params.layer]
    search = search_of(context, inputs.model, inputs.capture, layer, params.fit)
    if method not in NEEDS_MOMENTS:
        result = METHODS[method](layer.name, search, params.candidate, None, RoundingSettings(method), progress)
    else:
        settings = dict(params.settings)
        samples, batch_size = settings.pop("samples"), settings.pop("batch_size", None)
        feedback = settings.pop("feedback", True)
        assert inputs.calibration is not None
        state = PairedState(
            inputs.model, inputs.calibration, inputs.layers, inputs.capture, inputs.embeddings, samples, batch_size
        )
        paired = context.paired.get(state, inputs.previous)
        moments = paired.moments(layer) if layer.groups == 1 else None
        # A grouped convolution's rows see different inputs: rounded to nearest.
        used = method if moments is not None else "nearest"
        if used in ("closed_form", "block") and not feedback:
            used = "gptq"
        bias = own_bias(context.model(inputs.model).module, layer)
        result = METHODS[used](
            layer.name, search, params.candidate, moments, RoundingSettings(used, **settings), progress, bias
        )
        paired.set(layer, result.layer)
        context.paired.keep(paired, state, STEP.ref(params, inputs))
    info = {
        "layer": layer.name,
        "candidate": asdict(params.candidate),
        "previous": None if inputs.previous is None else inputs.previous.to_json(),
        "method": method,
        "error_before": result.error_before,
        "error_after": result.error_after,
        "iterations": result.iterations,
    }
    return {"codes.safetensors": tensors_bytes(result.layer.tensors()), "layer.json": json_bytes(info)}


def own_bias(module: nn.Module, layer: Layer) -> Tensor | None:
    """The bias that a layer may change: its own, unless another module has the weight too."""
    bias = module.get_submodule(layer.name).bias
    return bias.detach().float() if isinstance(bias, Tensor) and not layer.aliases else None


STEP = Step("round", 6, Params, Inputs, run)
