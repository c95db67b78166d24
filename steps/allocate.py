"""Step ``allocate``: the integer program of one budget (docs/METHOD.md, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlorq.allocation.choices import Choices, TableBudget, allocation_table, smallest_bytes, table_choices
from mlorq.allocation.program import Objective, Program, SolverName, solve
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes
from steps.base import Needs, Progress, Step, StepSpec

if TYPE_CHECKING:
    from steps.artifacts import ArtifactReader
    from steps.context import Context
    from steps.session import Session


TABLE_COSTS = "tables.json"  # file of step table_costs


@dataclass(frozen=True)
class Memory:
    """What the runtime that the model is meant for may hold.

    Attributes:
        target: the runtime, for display.
        rest: bytes of everything but the compressible layers.
        budget: most bytes of the compressible layers; None: any.
    """

    target: str
    rest: int
    budget: int | None


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
    memory: Memory | None = field(default=None, kw_only=True)
    tables: TableBudget | None = field(default=None, kw_only=True)

    @property
    def memory_bytes(self) -> int | None:
        """Most bytes of the layers in the runtime's memory; None: any."""
        return None if self.memory is None else self.memory.budget

    @property
    def solver_settings(self) -> dict[str, Any]:
        """Keyword arguments of ``mlorq.allocation.program.solve``."""
        return {"solver": self.solver, "time_limit": self.time_limit, "gap": self.gap}


@dataclass(frozen=True)
class Inputs:
    """The ``candidates`` and ``sensitivity`` artifacts by layer, and that of ``table_costs``."""

    candidates: Mapping[str, ArtifactRef]
    sensitivity: Mapping[str, ArtifactRef]
    tables: ArtifactRef | None = None


@dataclass(frozen=True)
class Limits:
    """A budget in bytes.

    Attributes:
        budget: as written in the configuration.
        bytes: most bytes of the compressible layers in the checkpoint.
        memory: of the runtime that the model is meant for; None without one.
        tables: how embedding tables take part; None: their bit-widths are not chosen.
    """

    budget: str
    bytes: int
    memory: Memory | None = None
    tables: TableBudget | None = None


def program_values(session: Session, limits: Limits, layers: Sequence[str]) -> dict[str, Any]:
    """The parameters of a program by name."""
    search = session.config.search
    solver = {name: getattr(search, name) for name in ("objective", "solver", "time_limit", "gap")}
    given = {"budget": limits.budget, "budget_bytes": limits.bytes, "memory": limits.memory, "tables": limits.tables}
    return {"layers": tuple(layers), **given, **solver}


def spec(
    session: Session,
    limits: Limits,
    layers: Sequence[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
    tables: ArtifactRef | None = None,
) -> StepSpec:
    """Depends on every layer's candidates and costs, the budget in bytes, and the solver's settings."""
    params = Params(**program_values(session, limits, layers))
    return STEP.spec(params, Inputs(candidates, sensitivity, tables), needs=Needs(device=False))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    choices, rows = joined(context.artifacts, params.layers, inputs.candidates, inputs.sensitivity)
    tables = TablesOfProgram.read(context.artifacts, params.tables, inputs.tables)
    program = Program(
        [*choices, *tables.choices],
        params.budget_bytes,
        objective=params.objective,
        memory_bytes=params.memory_bytes,
    )
    solution = solve(program, **params.solver_settings)
    table = allocation_table(choices, solution.picked[: len(choices)], rows)
    info = {
        "budget": params.budget,
        "budget_bytes": params.budget_bytes,
        "bytes": sum(table["bytes"].to_pylist()),
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": program.cost_of(solution.picked),
        **tables.to_json(solution.picked[len(choices) :]),
        **memory_json(params.memory, program, solution.picked),
        # Without its time, which the manifest has: the content of an artifact is a function of its key.
        "solver": {name: value for name, value in solution.report.to_json().items() if name != "seconds"},
    }
    return {"allocation.parquet": table_bytes(table), "allocation.json": json_bytes(info)}


def memory_json(memory: Memory | None, program: Program, picked: Sequence[int]) -> dict[str, Any]:
    """The memory of an allocation in the runtime that the model is meant for; empty without one."""
    if memory is None:
        return {}
    layers = program.memory_of(picked)
    assert layers is not None
    total = None if memory.budget is None else memory.budget + memory.rest
    return {
        "memory": {"target": memory.target, "bytes": layers + memory.rest, "rest": memory.rest, "budget_bytes": total}
    }


@dataclass(frozen=True)
class TablesOfProgram:
    """Embedding tables in a program, after its layers.

    Attributes:
        choices: one per table; none if bit-widths are not chosen.
        widths: the bit-widths that the choices stand for.
    """

    choices: list[Choices]
    widths: list[list[int]]

    @classmethod
    def read(cls, artifacts: ArtifactReader, budget: TableBudget | None, ref: ArtifactRef | None) -> TablesOfProgram:
        """The tables of a ``table_costs`` artifact."""
        if budget is None or ref is None:
            return cls([], [])
        return cls(*table_choices(artifacts.json(ref, TABLE_COSTS), budget))

    def to_json(self, picked: Sequence[int]) -> dict[str, Any]:
        """The chosen bit-widths and the tables' bytes; empty if none are chosen."""
        if not self.choices:
            return {}
        chosen = zip(self.choices, self.widths, picked, strict=True)
        held = [own.memory for own in self.choices]
        return {
            "tables": {own.layer: widths[place] for own, widths, place in chosen},
            "table_bytes": sum(int(own[place]) for own, place in zip(held, picked, strict=True) if own is not None),
        }


def joined(
    artifacts: ArtifactReader,
    layers: Sequence[str],
    candidates: Mapping[str, ArtifactRef],
    sensitivity: Mapping[str, ArtifactRef],
) -> tuple[list[Choices], Mapping[str, Sequence[Mapping[str, Any]]]]:
    """The choices of the program: the candidates of layers with their costs, and their table rows by layer."""
    space = artifacts.search_space(layers, candidates, sensitivity)
    return list(space.choices), space.rows


STEP = Step("allocate", 2, Params, Inputs, run)
