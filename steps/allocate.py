"""Step ``allocate``: the integer program of one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlorq.allocation.choices import Choices, allocation_table, choices_from_tables, smallest_bytes
from mlorq.allocation.program import Program, solve
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench

SOLVER = ("solver", "time_limit", "gap")
PROGRAM = ("objective", *SOLVER)


def spec(
    bench: Workbench,
    budget: str,
    budget_bytes: int,
    layers: list[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
) -> StepSpec:
    """Depends on every layer's candidates and costs, the budget in bytes, and the solver's settings."""
    search = bench.config.search
    params = {
        "layers": layers,
        "budget": budget,
        "budget_bytes": budget_bytes,
        **{name: getattr(search, name) for name in PROGRAM},
    }
    return STEP.spec(params, layer_inputs(layers, candidates, sensitivity), device=False)


def layer_inputs(
    layers: Sequence[str], candidates: Mapping[str, ArtifactRef], sensitivity: Mapping[str, ArtifactRef]
) -> dict[str, ArtifactRef | str]:
    """What ``joined`` reads."""
    inputs: dict[str, ArtifactRef | str] = {}
    for name in layers:
        inputs[f"candidates/{name}"] = candidates[name]
        inputs[f"sensitivity/{name}"] = sensitivity[name]
    return inputs


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    choices, rows = joined(spec, bench)
    program = Program(choices, params["budget_bytes"], objective=params["objective"])
    solution = solve(program, **{name: params[name] for name in SOLVER})
    table = allocation_table(choices, solution.picked, rows)
    info = {
        "budget": params["budget"],
        "budget_bytes": params["budget_bytes"],
        "bytes": sum(table["bytes"].to_pylist()),
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": float(sum(table["global_cost"].to_pylist())),
        # Its time is in the manifest: an artifact of one key has one content.
        "solver": {name: value for name, value in solution.report.to_json().items() if name != "seconds"},
    }
    return {"allocation.parquet": table_bytes(table), "allocation.json": json_bytes(info)}


def joined(spec: StepSpec, bench: Workbench) -> tuple[list[Choices], dict[str, list[dict[str, Any]]]]:
    """What the program chooses from: the candidates of a step's layers with their costs, and their rows."""
    choices, rows = [], {}
    for name in spec.params["layers"]:
        candidates = bench.store.read_table(spec.artifact(f"candidates/{name}"), "candidates.parquet")
        sensitivity = bench.store.read_table(spec.artifact(f"sensitivity/{name}"), "sensitivity.parquet")
        choice, rows[name] = choices_from_tables(name, candidates, sensitivity)
        choices.append(choice)
    return choices, rows


STEP = Step("allocate", 1, run)
