"""Step ``round``: the codes of one layer (docs/METHOD.md, sections 6, 7 and 9).

Methods that read a layer's inputs see those of the model whose earlier layers are already rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.config.compose import part
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import Candidate
from mlorq.models.kinds import BY_NAME
from mlorq.models.layer_list import Layer
from mlorq.rounding import METHODS, RoundingTask
from steps.base import Progress, Step, StepSpec
from steps.candidates import fits_of
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.paired_cache import PairedState
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """How a layer is rounded.

    Attributes:
        layer: its name.
        candidate: the chosen candidate.
        method: as ``rounding.method``.
        fit: of the candidate's matrices.
        settings: the settings of the ``rounding`` section that the method reads.
    """

    layer: str
    candidate: Candidate
    method: str
    fit: FitSettings
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The model and the layer's artifacts; for a sequential method also the data and the previous rounded layer."""

    model: ModelRef
    layers: ArtifactRef
    capture: ArtifactRef
    calibration: DataRef | None = None
    embeddings: ArtifactRef | None = None
    previous: ArtifactRef | None = None


def spec(
    session: Session,
    model: ModelRef,
    capture: ArtifactRef,
    layers: ArtifactRef,
    layer: Layer,
    candidate: Candidate,
    previous: ArtifactRef | None,
    tables: ArtifactRef | None,
) -> StepSpec:
    """Depends on the candidate, the layer before it (for sequential methods), the model and the calibration data.

    Not on the allocation's key: another budget reuses rounded layers as long as it chooses the same candidates.
    """
    rounding = session.config.rounding
    method = METHODS[rounding.method]
    settings = part(rounding, method.layer_settings).model_dump(mode="json") if method.sequential else {}
    params = Params(layer.name, candidate, method.name, session.config.search.fit, settings)
    inputs = Inputs(model, layers, capture)
    if method.sequential:
        inputs = Inputs(model, layers, capture, session.calibration_ref, tables, previous)
    return STEP.spec(params, inputs, layer)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    method = METHODS[params.method]
    settings = method.layer_settings.model_validate(params.settings)
    layer = context.artifacts.layers(inputs.layers)[params.layer]
    fits = fits_of(context, inputs.model, inputs.capture, layer, params.fit)
    bias = own_bias(context.model(inputs.model).module, layer)
    task = RoundingTask(layer.name, params.candidate, fits.hessian, fits.search.output_metric, bias=bias)
    if not method.needs_inputs:
        result = method.round(task, settings, progress)
    else:
        assert inputs.calibration is not None
        state = PairedState(
            inputs.model,
            inputs.calibration,
            inputs.layers,
            inputs.capture,
            inputs.embeddings,
            settings.samples,
            getattr(settings, "batch_size", None),
        )
        paired = context.paired.get(state, inputs.previous)
        # The rows of a grouped convolution have different inputs: no moments, and methods round it to nearest.
        moments = paired.moments(layer) if layer.groups == 1 else None
        result = method.round(replace(task, moments=moments), settings, progress)
        paired.set(layer, result.layer)
        context.paired.keep(paired, state, STEP.ref(params, inputs))
    info = {
        "layer": layer.name,
        "candidate": asdict(params.candidate),
        "previous": None if inputs.previous is None else inputs.previous.to_json(),
        "method": params.method,
        "error_before": result.error_before,
        "error_after": result.error_after,
        "iterations": result.iterations,
    }
    return {"codes.safetensors": tensors_bytes(result.layer.tensors()), "layer.json": json_bytes(info)}


def own_bias(module: nn.Module, layer: Layer) -> Tensor | None:
    """The bias that rounding may change: the layer's own, unless another module shares the weight.

    The bias of a transposed convolution stays: the rows of one channel have errors of their own at other positions.
    """
    bias = module.get_submodule(layer.name).bias
    own = not layer.aliases and not BY_NAME[layer.kind].is_transposed
    return bias.detach().float() if isinstance(bias, Tensor) and own else None


STEP = Step("round", 8, Params, Inputs, run)
