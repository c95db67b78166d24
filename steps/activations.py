"""Step ``activations``: where activations are quantized, with which ranges, and which LayerNorms are folded for it."""

from __future__ import annotations

from mlorq.activations.calibrate import calibrate
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from steps.base import Progress, Step, StepSpec
from steps.context import PLAN, PLAN_TENSORS, Workbench


def spec(bench: Workbench, layers: ArtifactRef) -> StepSpec:
    """Depends on the float model, the calibration data, the layers and the settings of the ``activations`` method."""
    chosen = bench.config.activations
    assert chosen is not None
    # What the choice of widths may cost in all is the program's to know.
    params = {**chosen.own.model_dump(mode="json", exclude={"compute"}), "seed": bench.config.seed}
    inputs: dict[str, ArtifactRef | str] = {
        "model": bench.float_model.key,
        "calibration": bench.calibration.key,
        "layers": layers,
    }
    return STEP.spec(params, inputs)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = dict(spec.params)
    seed = params.pop("seed")
    settings = ACTIVATION_METHODS[params["method"]].settings.model_validate(params)
    plan = calibrate(
        bench.float_model,
        bench.layer_list(spec.artifact("layers")).layers,
        bench.batches(settings.samples),
        settings,
        seed=seed,
        device=bench.device,
        progress=progress,
    )
    return {PLAN: json_bytes(plan.to_json()), PLAN_TENSORS: tensors_bytes(dict(plan.tensors))}


STEP = Step("activations", 2, run)
