"""Step ``width_costs``: output costs with the activations of one group alone quantized, per group and bit-width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlorq.artifacts.store import ArtifactRef, json_bytes
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.measuring import Measuring, measuring
from steps.session import Session

COSTS = "costs.json"


@dataclass(frozen=True)
class Params:
    """How the costs of activations' bit-widths are measured."""

    measuring: Measuring


@dataclass(frozen=True)
class Inputs:
    """The model with the plan of all bit-widths, and the calibration data."""

    model: ModelRef
    calibration: DataRef


def spec(session: Session, model: ModelRef, layers: ArtifactRef) -> StepSpec:
    """Depends on the plan of all bit-widths and the samples that costs are measured on.

    Args:
        session: of the run.
        model: with the plan of all bit-widths.
        layers: the ``layers`` artifact.
    """
    params = Params(measuring(session, session.artifacts.layers(layers).layers))
    return STEP.spec(params, Inputs(model, session.calibration_ref))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    import torch

    from mlorq.costs.output_cost import OutputCost
    from mlorq.models.batches import move_batch
    from mlorq.models.copying import copy_module

    model, plan = context.model(inputs.model), context.plan(inputs.model)
    assert plan is not None
    groups = plan.groups()
    batches, labels = params.measuring.of(context.calibration(inputs.calibration))
    moved = [move_batch(batch, context.device, model.dtype) for batch in batches]
    with torch.no_grad():
        references = [model.outputs(model.module, batch) for batch in moved]
        cost = OutputCost(params.measuring.cost, references, labels)
        todo = {name: widths_of(sites) for name, sites in groups.items()}
        total, done = sum(len(widths) for widths in todo.values()), 0
        found: dict[str, dict[str, float]] = {name: {} for name in groups}
        for width in sorted({width for widths in todo.values() for width in widths}):
            module = copy_module(model.module)
            chosen = {name: width for name, widths in todo.items() if width in widths}
            installed = plan.at(chosen).install(module)
            for quantizer in installed.values():
                quantizer.enabled = False
            for name in chosen:
                own = [installed[site.name] for site in groups[name]]
                for quantizer in own:
                    quantizer.enabled = True
                found[name][str(width)] = cost([model.outputs(module, batch) for batch in moved])
                for quantizer in own:
                    quantizer.enabled = False
                done += 1
                progress(done, total)
    return {COSTS: json_bytes(found)}


def widths_of(sites: list[Any]) -> list[int]:
    """The bit-widths that a group may have, in increasing order."""
    return sorted({int(sites[0].quantizer["bits"]), *map(int, sites[0].variants)})


STEP = Step("width_costs", 2, Params, Inputs, run)
