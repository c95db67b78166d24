"""Step ``activations``: quantizers of activations, and folded LayerNorms (docs/METHOD.md, section 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlorq.activations.calibrate import calibrate
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.costs.measured import spread_batches
from steps.artifacts import PLAN, PLAN_TENSORS
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """How ranges are found.

    Attributes:
        method: as ``activations.method``.
        settings: the settings of the ``activations`` section that the method reads.
        seed: for the tokens that are drawn.
    """

    method: str
    settings: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Inputs:
    """The model as given, the calibration data, and the ``layers`` artifact."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef


def spec(session: Session, layers: ArtifactRef) -> StepSpec:
    """Depends on the float model, the calibration data, the layers and the ``activations`` section."""
    chosen = session.config.activations
    assert chosen is not None
    # The compute budget is a constraint of the integer program (step ``joint``); ranges do not depend on it.
    values = chosen.own.model_dump(mode="json", exclude={"compute"})
    params = Params(chosen.method, values, session.config.seed)
    return STEP.spec(params, Inputs(session.model_ref, session.calibration_ref, layers))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    model = context.model(inputs.model)
    settings = ACTIVATION_METHODS[params.method].settings.model_validate(params.settings)
    batches = spread_batches(context.calibration(inputs.calibration).batches, settings.samples)
    listed = context.artifacts.layers(inputs.layers)
    layers, batches = listed.layers, list(listed.batches(batches))
    plan = calibrate(model, layers, batches, settings, seed=params.seed, device=context.device, progress=progress)
    return {PLAN: json_bytes(plan.to_json()), PLAN_TENSORS: tensors_bytes(dict(plan.tensors))}


STEP = Step("activations", 3, Params, Inputs, run)
