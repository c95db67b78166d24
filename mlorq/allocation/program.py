"""Inter-layer search: one integer program under the memory budget (METHOD 5; MLoRQ, arXiv 2507.09616).

Exactly one candidate a layer, least summed cost, memory within the budget:

    min Σ_ℓc x_ℓc cost_ℓc   subject to   Σ_c x_ℓc = 1 for every layer ℓ,   Σ_ℓc x_ℓc bytes_ℓc ≤ budget,   x binary.

With objective ``nsr`` the cost is the NMSE; with ``sqnr`` the summed signal-to-noise ratio 1/NMSE is maximised. The two
are not equivalent. Candidates that another one of the same layer beats in cost and memory cannot be part of a best
solution and are left out, which shrinks the program without changing its optimum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pulp
import pyarrow as pa

from mlorq.artifacts.schemas import ALLOCATION
from mlorq.costs.pareto import pareto_front
from mlorq.errors import BudgetError

Objective = Literal["nsr", "sqnr"]
SolverName = Literal["highs", "cbc"]

SMALLEST_NMSE = 1e-12  # below float32 noise: keeps 1/NMSE finite


@dataclass(frozen=True)
class Choices:
    """The candidates of one layer that the program may choose from.

    Attributes:
        layer: name.
        cost: ``(candidates,)`` global cost (NMSE).
        size: ``(candidates,)`` bytes, int64.
    """

    layer: str
    cost: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class SolverReport:
    """How the program was solved.

    Attributes:
        name: ``highs`` or ``cbc``.
        status: ``optimal``, or ``feasible`` where the time limit ended the search.
        objective: summed cost of the solution (``sqnr``: summed 1/NMSE).
        bound: best bound proved on it; null where the solver gives none.
        gap: relative distance of objective and bound; null with the bound.
        seconds: of solving.
    """

    name: str
    status: str
    objective: float
    bound: float | None
    gap: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def smallest_bytes(choices: Sequence[Choices]) -> int:
    """Bytes of the smallest configuration there is."""
    return int(sum(int(layer.size.min()) for layer in choices))


def require_bytes(choices: Sequence[Choices], budget_bytes: int) -> None:
    """Refuse a budget that the smallest configuration exceeds.

    Raises:
        BudgetError: names the smallest possible one.
    """
    smallest = smallest_bytes(choices)
    if budget_bytes < smallest:
        raise BudgetError(
            f"budget of {budget_bytes} bytes for the compressible layers is too small: "
            f"the smallest possible is {smallest} bytes"
        )


def solve_program(
    problem: pulp.LpProblem, solver: SolverName, time_limit: float, gap: float
) -> tuple[str | None, float | None]:
    """Solve a program on one thread, so that the same program has the same solution.

    Args:
        problem: to minimise.
        solver: ``highs`` or ``cbc``.
        time_limit: seconds.
        gap: relative gap at which the solver may stop.

    Returns:
        ``optimal`` or ``feasible``, None where nothing was found; and the best bound, None where there is none.
    """
    if solver == "highs":
        problem.solve(pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap, threads=1))
    else:
        problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap, threads=1))
    known = {pulp.LpSolutionOptimal: "optimal", pulp.LpSolutionIntegerFeasible: "feasible"}
    status = known.get(problem.sol_status)
    bound = float(problem.solverModel.getInfo().mip_dual_bound) if status and solver == "highs" else None
    return status, bound if bound is not None and np.isfinite(bound) else None


def allocate(
    choices: Sequence[Choices],
    budget_bytes: int,
    *,
    objective: Objective = "nsr",
    solver: SolverName = "highs",
    time_limit: float = 120.0,
    gap: float = 1e-4,
) -> tuple[list[int], SolverReport]:
    """Choose one candidate a layer.

    Args:
        choices: the layers and their candidates.
        budget_bytes: most bytes of all layers together.
        objective: ``nsr`` or ``sqnr``.
        solver: ``highs`` or ``cbc``.
        time_limit: seconds.
        gap: relative gap at which the solver may stop.

    Returns:
        The index of the chosen candidate of every layer, and the solver's report.

    Raises:
        BudgetError: nothing fits; the smallest feasible budget is named.
    """
    require_bytes(choices, budget_bytes)
    started = time.perf_counter()
    kept = [np.flatnonzero(pareto_front(layer.cost, layer.size)) for layer in choices]
    values = [_value(layer.cost[rows], objective) for layer, rows in zip(choices, kept, strict=True)]
    sizes = [layer.size[rows] for layer, rows in zip(choices, kept, strict=True)]
    picked, status, bound = _solve(values, sizes, budget_bytes, solver, time_limit, gap)
    achieved = float(sum(value[index] for value, index in zip(values, picked, strict=True)))
    relative = None if bound is None else abs(achieved - bound) / max(abs(achieved), 1e-300)
    if objective == "sqnr":
        achieved, bound = -achieved, None if bound is None else -bound
    report = SolverReport(solver, status, achieved, bound, relative, time.perf_counter() - started)
    return [int(rows[index]) for rows, index in zip(kept, picked, strict=True)], report


def _value(cost: np.ndarray, objective: Objective) -> np.ndarray:
    return cost if objective == "nsr" else -1.0 / np.maximum(cost, SMALLEST_NMSE)


def _solve(
    values: list[np.ndarray],
    sizes: list[np.ndarray],
    budget: int,
    solver: SolverName,
    time_limit: float,
    gap: float,
) -> tuple[list[int], str, float | None]:
    """Build and solve the program; returns picks, status and the bound in the units of ``values``."""
    # Solvers compare objectives with absolute tolerances near 1e-6, which summed NMSEs can be below: scale so that a
    # simple feasible solution is worth about a thousand.
    scale = 1e3 / max(_simple_value(values, sizes, budget), 1e-300)
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = [
        [pulp.LpVariable(f"x_{layer}_{index}", cat=pulp.LpBinary) for index in range(len(value))]
        for layer, value in enumerate(values)
    ]
    problem += pulp.LpAffineExpression(
        (variable, float(cost * scale))
        for variables, value in zip(x, values, strict=True)
        for variable, cost in zip(variables, value, strict=True)
    )
    for variables in x:
        problem += pulp.LpAffineExpression((variable, 1) for variable in variables) == 1
    # Memory relative to the budget, for the same reason as above.
    problem += (
        pulp.LpAffineExpression(
            (variable, float(size) / budget)
            for variables, layer_sizes in zip(x, sizes, strict=True)
            for variable, size in zip(variables, layer_sizes, strict=True)
        )
        <= 1
    )
    status, bound = solve_program(problem, solver, time_limit, gap)
    if status is None:
        raise BudgetError(
            f"{solver} found no allocation within {time_limit} s (status {pulp.LpStatus[problem.status]}); "
            "raise search.time_limit"
        )
    picked = [int(np.argmax([variable.value() or 0.0 for variable in variables])) for variables in x]
    picked = _repair(picked, values, sizes, budget)
    return picked, status, None if bound is None else bound / scale


def _simple_value(values: list[np.ndarray], sizes: list[np.ndarray], budget: int) -> float:
    """Magnitude of the objective where every layer keeps its share of the budget."""
    largest = sum(int(size.max()) for size in sizes)
    share = min(1.0, budget / largest)
    total = 0.0
    for value, size in zip(values, sizes, strict=True):
        fitting = value[size <= max(size.min(), share * size.max())]
        total += float(np.abs(fitting[fitting.argmin()]))
    return total


def _repair(picked: list[int], values: list[np.ndarray], sizes: list[np.ndarray], budget: int) -> list[int]:
    """Undo a solver's tolerance: while bytes exceed the budget, take the cheapest step to a smaller candidate."""
    picked = list(picked)
    while sum(int(size[index]) for size, index in zip(sizes, picked, strict=True)) > budget:
        best: tuple[float, int, int] | None = None
        for layer, index in enumerate(picked):
            smaller = np.flatnonzero(sizes[layer] < sizes[layer][index])
            if len(smaller):
                rise = values[layer][smaller] - values[layer][index]
                step = (float(rise.min()), layer, int(smaller[rise.argmin()]))
                best = step if best is None or step < best else best
        assert best is not None, "the smallest configuration fits: checked before solving"
        picked[best[1]] = best[2]
    return picked


def allocation_table(
    choices: Sequence[Choices], picked: Sequence[int], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> pa.Table:
    """The chosen candidates as a table (``tables.ALLOCATION``).

    Args:
        choices: as given to ``allocate``.
        picked: as returned by ``allocate``.
        rows: for every layer, its candidates' rows in the order of ``choices``.
    """
    table = []
    for layer, index in zip(choices, picked, strict=True):
        row = rows[layer.layer][index]
        table.append(
            {
                "layer": layer.layer,
                "global_cost": float(layer.cost[index]),
                **{name: row[name] for name in ("candidate_id", "form", "bits", "bits_a", "bits_b", "rank", "bytes")},
            }
        )
    return pa.Table.from_pylist(table, schema=ALLOCATION)


def choices_from_tables(
    layer: str, candidates: pa.Table, sensitivity: pa.Table
) -> tuple[Choices, list[dict[str, Any]]]:
    """Join a layer's candidates with their global costs."""
    by_id = {row["candidate_id"]: row for row in candidates.to_pylist()}
    rows = [by_id[name] for name in sensitivity["candidate_id"].to_pylist()]
    cost = sensitivity["global_cost"].to_numpy()
    size = np.array([row["bytes"] for row in rows], dtype=np.int64)
    return Choices(layer, cost, size), rows
