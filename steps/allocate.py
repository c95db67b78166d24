"""Step ``allocate``: the integer program of one budget (docs/METHOD.md, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlorq.allocation.choices import Choices, allocation_table, smallest_bytes
from mlorq.allocation.program import Objective, Program, SolverName, solve
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes
from steps.base import Needs, Progress, Step, StepSpec

if TYPE_CHECKING:
    from steps.artifacts import ArtifactReader
    from steps.context import Context
    from steps.session import Session


@dataclass(frozen=True)
class Params:
    """The layers, the budget (as written in the configuration, and in bytes), and the solver's settings."""

    layers: tuple[str, ...]
    budget: str
    budget_bytes: int
    objective: Objective
    solver: SolverName
    time_limit: float
    gap: float

    @property
    def solver_settings(self) -> dict[str, Any]:
        """Keyword arguments of ``mlorq.allocation.program.solve``."""
        return {"solver": self.solver, "time_limit": self.time_limit, "gap": self.gap}


@dataclass(frozen=True)
class Inputs:
    """The ``candidates`` and ``sensitivity`` artifacts by layer."""

    candidates: Mapping[str, ArtifactRef]
    sensitivity: Mapping[str, ArtifactRef]


def program_values(session: Session, budget: str, budget_bytes: int, layers: Sequence[str]) -> dict[str, Any]:
    """The parameters of a program by name."""
    search = session.config.search
    solver = {name: getattr(search, name) for name in ("objective", "solver", "time_limit", "gap")}
    return {"layers": tuple(layers), "budget": budget, "budget_bytes": budget_bytes, **solver}


def spec(
    session: Session,
    budget: str,
    budget_bytes: int,
    layers: Sequence[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
) -> StepSpec:
    """Depends on every layer's candidates and costs, the budget in bytes, and the solver's settings."""
    params = Params(**program_values(session, budget, budget_bytes, layers))
    return STEP.spec(params, Inputs(candidates, sensitivity), needs=Needs(device=False))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    choices, rows = joined(context.artifacts, params.layers, inputs.candidates, inputs.sensitivity)
    solution = solve(Program(choices, params.budget_bytes, objective=params.objective), **params.solver_settings)
    table = allocation_table(choices, solution.picked, rows)
    info = {
        "budget": params.budget,
        "budget_bytes": params.budget_bytes,
        "bytes": sum(table["bytes"].to_pylist()),
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": float(sum(table["global_cost"].to_pylist())),
        # Without its time, which the manifest has: the content of an artifact is a function of its key.
        "solver": {name: value for name, value in solution.report.to_json().items() if name != "seconds"},
    }
    return {"allocation.parquet": table_bytes(table), "allocation.json": json_bytes(info)}


def joined(
    artifacts: ArtifactReader,
    layers: Sequence[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
) -> tuple[list[Choices], Mapping[str, Sequence[Mapping[str, Any]]]]:
    """The choices of the program: the candidates of layers with their costs, and their table rows by layer."""
    space = artifacts.search_space(layers, candidates, sensitivity)
    return list(space.choices), space.rows


STEP = Step("allocate", 1, Params, Inputs, run)
