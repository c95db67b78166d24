"""Step ``joint``: bit-widths of activations, chosen together with the layers' candidates in one program.

Its artifact holds the allocation, and the activation plan with the chosen bit-widths. docs/METHOD.md, section 8
(``choices``), has the program; step ``width_costs`` measures the costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlorq.activations.compute import parse_compute
from mlorq.activations.plan import ActivationPlan
from mlorq.allocation.choices import Group, WidthChoices, allocation_table, smallest_bytes
from mlorq.allocation.program import Program, solve
from mlorq.allocation.weight_load import weight_load
from mlorq.artifacts.store import ArtifactRef, arrays_bytes, json_bytes, table_bytes
from mlorq.forms import Candidate
from mlorq.models.layer_list import Layer
from steps.allocate import Limits, TablesOfProgram, joined, memory_json, program_values
from steps.allocate import Params as ProgramParams
from steps.artifacts import PLAN, PLAN_TENSORS
from steps.base import Needs, Progress, Step, StepSpec
from steps.width_costs import COSTS, widths_of

if TYPE_CHECKING:
    from steps.context import Context
    from steps.session import Session


@dataclass(frozen=True)
class Params(ProgramParams):
    """As of the program without widths, and the most bit operations per sample (as asked for)."""

    compute: str


@dataclass(frozen=True)
class Inputs:
    """The layers, the plan of all bit-widths and its costs, ``candidates`` and ``sensitivity`` by layer, tables."""

    layers: ArtifactRef
    plan: ArtifactRef
    costs: ArtifactRef
    candidates: Mapping[str, ArtifactRef]
    sensitivity: Mapping[str, ArtifactRef]
    tables: ArtifactRef | None = None


def spec(
    session: Session,
    limits: Limits,
    layers: ArtifactRef,
    names: Sequence[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
    plan: ArtifactRef,
    costs: ArtifactRef,
    tables: ArtifactRef | None = None,
) -> StepSpec:
    """Depends on all costs, both budgets, and the solver's settings."""
    activations = session.config.activations
    assert activations is not None
    assert activations.compute is not None
    params = Params(**program_values(session, limits, names), compute=activations.compute)
    inputs = Inputs(layers, plan, costs, candidates, sensitivity, tables)
    return STEP.spec(params, inputs, needs=Needs(device=False))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    artifacts = context.artifacts
    choices, rows = joined(artifacts, params.layers, inputs.candidates, inputs.sensitivity)
    listed = artifacts.layers(inputs.layers)
    layers = [listed[name] for name in params.layers]
    # Its tensors are only selected and renamed: as NumPy arrays, they need no torch.
    plan = ActivationPlan.from_json(artifacts.json(inputs.plan, PLAN), artifacts.arrays(inputs.plan, PLAN_TENSORS))
    costs = artifacts.json(inputs.costs, COSTS)
    groups, group_of = program_groups(plan, costs, layers)
    choices = [
        replace(choice, load=np.array([weight_load(layer, Candidate.of_row(row)) for row in rows[layer.name]]))
        for choice, layer in zip(choices, layers, strict=True)
    ]
    product_macs = float(sum(site.macs for site in plan.sites))
    compute = parse_compute(params.compute, float(sum(layer.macs for layer in layers)), product_macs)
    tables = TablesOfProgram.read(artifacts, params.tables, inputs.tables)
    # Tables multiply nothing: without a load, it does not matter which group they read.
    widths = WidthChoices(groups, [*group_of, *(0 for _ in tables.choices)], compute)
    program = Program(
        [*choices, *tables.choices],
        params.budget_bytes,
        widths,
        objective=params.objective,
        memory_bytes=params.memory_bytes,
    )
    solution = solve(program, **params.solver_settings)
    decided = {group.name: int(group.widths[place]) for group, place in zip(groups, solution.widths, strict=True)}
    table = allocation_table(choices, solution.picked[: len(choices)], rows)
    info = {
        "budget": params.budget,
        "budget_bytes": params.budget_bytes,
        "bytes": sum(table["bytes"].to_pylist()),
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": program.cost_of(solution.picked, solution.widths),
        **tables.to_json(solution.picked[len(choices) :]),
        **memory_json(params.memory, program, solution.picked),
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
        PLAN_TENSORS: arrays_bytes(chosen.tensors),
    }


def program_groups(
    plan: ActivationPlan, costs: Mapping[str, Mapping[str, float]], layers: list[Layer]
) -> tuple[list[Group], list[int]]:
    """The program's groups, and for each layer the index of its group. Pixels have a single bit-width."""
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


STEP = Step("joint", 2, Params, Inputs, run)
