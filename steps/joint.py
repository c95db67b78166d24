"""Steps ``width_costs`` and ``joint``: activations' code widths chosen together with the layers' candidates.

``width_costs`` measures what the output costs with the activations of one group alone quantized, for every group and
width. ``joint`` solves one program for both; its artifact is an allocation, and holds the activations' plan with the
widths decided as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mlorq.activations.compute import parse_compute
from mlorq.activations.plan import ActivationPlan
from mlorq.allocation.choices import Group, WidthChoices, allocation_table, smallest_bytes
from mlorq.allocation.program import Program, solve
from mlorq.allocation.weight_load import weight_load
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes, tensors_bytes
from mlorq.costs.output_cost import OutputCost
from mlorq.forms.base import Candidate
from mlorq.models.base import move_batch
from mlorq.models.layers import Layer
from steps.allocate import PROGRAM, SOLVER, joined, layer_inputs
from steps.base import Progress, Step, StepSpec
from steps.context import PLAN, PLAN_TENSORS, Workbench, read_plan
from steps.sensitivity import cost_params

COSTS = "costs.json"


def costs_spec(bench: Workbench) -> StepSpec:
    """Depends on the plan of all widths (by the model's inputs) and the samples that costs are measured on."""
    search = bench.config.search
    params = {"samples": search.samples, "held_out": search.metric == "moments", **cost_params(bench)}
    return COSTS_STEP.spec(params, {**bench.model_inputs, "calibration": bench.calibration.key})


def run_costs(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    assert bench.plan is not None
    model, groups = bench.model, bench.plan.groups()
    batches, labels = bench.measuring(params["samples"], held_out=params["held_out"])
    moved = [move_batch(batch, bench.device, model.dtype) for batch in batches]
    with torch.no_grad():
        references = [model.outputs(model.module, batch) for batch in moved]
        cost = OutputCost(params["cost"], references, labels)
        todo = {name: widths_of(sites) for name, sites in groups.items()}
        total, done = sum(len(widths) for widths in todo.values()), 0
        found: dict[str, dict[str, float]] = {name: {} for name in groups}
        for width in sorted({width for widths in todo.values() for width in widths}):
            module = deepcopy(model.module)
            chosen = {name: width for name, widths in todo.items() if width in widths}
            installed = bench.plan.at(chosen).install(module)
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
    """The code widths that a group may have, rising."""
    return sorted({int(sites[0].quantizer["bits"]), *map(int, sites[0].variants)})


def spec(
    bench: Workbench,
    budget: str,
    budget_bytes: int,
    layers: ArtifactRef,
    names: list[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
    plan: ArtifactRef,
    costs: ArtifactRef,
) -> StepSpec:
    """Depends on all costs, both budgets, and the solver's settings."""
    search, activations = bench.config.search, bench.config.activations
    assert activations is not None
    params = {
        "layers": names,
        "budget": budget,
        "budget_bytes": budget_bytes,
        "compute": activations.compute,
        **{name: getattr(search, name) for name in PROGRAM},
    }
    # Not in the role ``activations``: this step works with no model.
    inputs: dict[str, ArtifactRef | str] = {"layers": layers, "plan": plan, "costs": costs}
    return STEP.spec(params, inputs | layer_inputs(names, candidates, sensitivity), device=False)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params, store = spec.params, bench.store
    choices, rows = joined(spec, bench)
    listed = bench.layer_list(spec.artifact("layers"))
    layers = [listed[name] for name in params["layers"]]
    plan = read_plan(store, spec.artifact("plan"))
    costs = store.read_json(spec.artifact("costs"), COSTS)
    groups, group_of = program_groups(plan, costs, layers)
    choices = [
        replace(choice, load=np.array([weight_load(layer, Candidate.of_row(row)) for row in rows[layer.name]]))
        for choice, layer in zip(choices, layers, strict=True)
    ]
    product_macs = float(sum(site.macs for site in plan.sites))
    compute = parse_compute(params["compute"], float(sum(layer.macs for layer in layers)), product_macs)
    program = Program(
        choices, params["budget_bytes"], WidthChoices(groups, group_of, compute), objective=params["objective"]
    )
    solution = solve(program, **{name: params[name] for name in SOLVER})
    decided = {group.name: int(group.widths[place]) for group, place in zip(groups, solution.widths, strict=True)}
    table = allocation_table(choices, solution.picked, rows)
    info = {
        "budget": params["budget"],
        "budget_bytes": params["budget_bytes"],
        "bytes": sum(table["bytes"].to_pylist()),
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": program.cost_of(solution.picked, solution.widths),
        "compute": compute,
        "bit_operations": program.operations_of(solution.picked, solution.widths),
        "activation_bits": decided,
        "solver": {name: value for name, value in solution.report.to_json().items() if name != "seconds"},
    }
    chosen = plan.at(decided)
    return {
        "allocation.parquet": table_bytes(table),
        "allocation.json": json_bytes(info),
        PLAN: json_bytes(chosen.to_json()),
        PLAN_TENSORS: tensors_bytes(dict(chosen.tensors)),
    }


def program_groups(
    plan: ActivationPlan, costs: Mapping[str, Mapping[str, float]], layers: list[Layer]
) -> tuple[list[Group], list[int]]:
    """The program's groups, and which of them each layer reads; pixels have one width and no choice."""
    found: list[Group] = []
    reading: dict[str, int] = {}
    for name, sites in plan.groups().items():
        widths = widths_of(sites)
        macs = float(sum(site.macs for site in sites))
        found.append(
            Group(
                name,
                np.array(widths),
                np.array([costs[name][str(width)] for width in widths]),
                np.array([macs * width**2 for width in widths]),
            )
        )
        reading |= {layer: len(found) - 1 for site in sites for layer in site.layers}
    return found, [reading[layer.name] for layer in layers]


COSTS_STEP = Step("width_costs", 1, run_costs)
STEP = Step("joint", 2, run)
