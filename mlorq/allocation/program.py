"""Inter-layer search: an integer program under a memory budget (METHOD 5; MLoRQ, arXiv 2507.09616).

Exactly one candidate per layer, least summed cost, memory within the budget:

    min Σ_ℓc x_ℓc cost_ℓc   subject to   Σ_c x_ℓc = 1 for every layer ℓ,   Σ_ℓc x_ℓc bytes_ℓc ≤ budget,   x binary.

With objective ``nsr`` the cost is the NMSE; with ``sqnr`` the summed signal-to-noise ratio 1/NMSE is maximised. The two
are not equivalent. This program is a multiple-choice knapsack problem, which ``mlorq.allocation.knapsack`` solves
exactly, usually in about a millisecond. A budget of the memory of the runtime that the model is meant for is a second
row of the same kind, ``Σ_ℓc x_ℓc memory_ℓc ≤ memory``.

If bit-widths of activations are chosen too (METHOD 8), every group g of activations gets one width a, and the
program has further rows: one width per group, linking variables z, and a compute budget,

    min Σ_ℓc x_ℓc cost_ℓc + Σ_ga y_ga cost_ga
    Σ_a y_ga = 1,   Σ_a z_ℓca = x_ℓc,   Σ_c z_ℓca = y_ga  (g: what layer ℓ reads),
    Σ_ℓca z_ℓca load_ℓc a + Σ_ga y_ga ops_ga ≤ compute.

A bit operation is a product of one bit of a weight with one of an activation: a multiply-accumulate of a b-bit weight
and an a-bit input counts ``a b`` of them, so that a layer's load per bit of its input is its multiply-accumulates times
the bits of its weights, ``load_ℓc``. For integer x and y, z is their product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlorq.allocation.choices import Choices, WidthChoices, require_bytes
from mlorq.allocation.knapsack import least_value
from mlorq.errors import BudgetError
from mlorq.numbers import byte_count

if TYPE_CHECKING:
    import pulp

Objective = Literal["nsr", "sqnr"]
SolverName = Literal["exact", "highs", "cbc"]
Floats = NDArray[np.float64]

SMALLEST_NMSE = 1e-12  # below float32 noise: keeps 1/NMSE finite
COMPUTE_TOLERANCE = 1e-9  # relative; bit operations are sums of floats, bytes are exact


@dataclass(frozen=True)
class Program:
    """An allocation problem.

    Attributes:
        choices: the layers and their candidates, with loads if widths are chosen.
        budget_bytes: largest number of bytes of all layers together.
        memory_bytes: largest number of bytes in the memory of the chosen runtime; None: any.
        widths: bit-widths of activations and the compute budget; None: no widths are chosen.
        objective: ``nsr`` or ``sqnr``.
    """

    choices: Sequence[Choices]
    budget_bytes: int
    widths: WidthChoices | None = None
    objective: Objective = "nsr"
    memory_bytes: int | None = None

    def bytes_of(self, picked: Sequence[int]) -> int:
        """Bytes of an allocation."""
        return sum(int(layer.size[row]) for layer, row in zip(self.choices, picked, strict=True))

    def memory_of(self, picked: Sequence[int]) -> int | None:
        """Bytes of an allocation in the memory of the chosen runtime; None without one."""
        return _total([layer.memory for layer in self.choices], picked)

    def cost_of(self, picked: Sequence[int], widths: Sequence[int] = ()) -> float:
        """Summed cost of an allocation: of its layers and, if widths are chosen, of its groups."""
        layers = float(sum(layer.cost[row] for layer, row in zip(self.choices, picked, strict=True)))
        groups = () if self.widths is None else self.widths.groups
        return layers + float(sum(group.cost[place] for group, place in zip(groups, widths, strict=True)))

    def operations_of(self, picked: Sequence[int], widths: Sequence[int]) -> float:
        """Bit operations per sample of an allocation; 0 if no widths are chosen."""
        if self.widths is None:
            return 0.0
        groups = self.widths.groups
        products = sum(float(group.operations[place]) for group, place in zip(groups, widths, strict=True))
        return products + sum(
            float(_load(layer)[row]) * float(groups[group].widths[widths[group]])
            for layer, row, group in zip(self.choices, picked, self.widths.group_of, strict=True)
        )

    def least_operations(self) -> float:
        """Bit operations per sample of the allocation that needs the fewest."""
        if self.widths is None:
            return 0.0
        narrowest = [int(group.widths.argmin()) for group in self.widths.groups]
        return self.operations_of([int(_load(layer).argmin()) for layer in self.choices], narrowest)


@dataclass(frozen=True)
class SolverReport:
    """How the program was solved.

    Attributes:
        name: the one that solved it: ``exact``, ``highs`` or ``cbc``.
        status: ``optimal``, or ``feasible`` if the time limit ended the search.
        objective: summed cost of the solution (``sqnr``: summed 1/NMSE).
        bound: best proved bound on the objective; None if the solver gives none.
        gap: relative gap between objective and bound; None without a bound.
        seconds: time to build and solve the program.
    """

    name: str
    status: str
    objective: float
    bound: float | None
    gap: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as the allocation's artifact stores it."""
        return asdict(self)


@dataclass(frozen=True)
class Solution:
    """An allocation.

    Attributes:
        picked: index of each layer's candidate.
        widths: index of each group's width; empty if none are chosen.
        report: how the program was solved.
    """

    picked: list[int]
    widths: list[int]
    report: SolverReport


def solve(program: Program, *, solver: SolverName = "exact", time_limit: float = 120.0, gap: float = 1e-4) -> Solution:
    """Choose a candidate for every layer and, if ``program.widths`` is set, a width for every group of activations.

    Args:
        program: what to solve.
        solver: ``exact``, ``highs`` or ``cbc``; ``exact`` is ``highs`` for programs with widths, for those in which
            both bytes and memory bind, and for those with too many partial allocations
            (``mlorq.allocation.knapsack``).
        time_limit: time limit of the solver, in seconds.
        gap: relative gap at which the solver may stop.

    Raises:
        BudgetError: no allocation fits; the message gives the least possible budget if one budget alone is too small.
        ValueError: widths are to be chosen, and a layer has no loads, or memory is bounded and a layer has none.
    """
    require_bytes(program.choices, program.budget_bytes, program.memory_bytes)
    least = program.least_operations()
    if program.widths is not None and program.widths.compute < least:
        raise BudgetError(
            f"activations.compute: {program.widths.compute:.4g} bit operations per sample are too few: "
            f"the least possible is {least:.4g}"
        )
    started = time.perf_counter()
    terms = _Terms(program)
    if solver == "exact" and program.widths is None:
        exact = _exact(program, terms)
        if exact is not None:
            total = float(sum(value[place] for value, place in zip(terms.value, exact, strict=True)))
            total = total if program.objective == "nsr" else -total
            report = SolverReport("exact", "optimal", total, total, 0.0, time.perf_counter() - started)
            return Solution([int(own.useful[at]) for own, at in zip(program.choices, exact, strict=True)], [], report)
    solver = "highs" if solver == "exact" else solver
    problem, x, y = _build(program, terms)
    status, bound = _run(problem, solver, time_limit, gap)
    if status is None:
        raise BudgetError(_nothing_found(program, solver, time_limit, problem))
    places, widths = _repaired(program, terms, [_highest(own) for own in x], [_highest(own) for own in y])
    achieved = float(sum(value[place] for value, place in zip(terms.value, places, strict=True)))
    achieved += float(sum(value[place] for value, place in zip(terms.group_value, widths, strict=True)))
    bound = None if bound is None else bound / terms.scale
    relative = None if bound is None else abs(achieved - bound) / max(abs(achieved), 1e-300)
    if program.objective == "sqnr":
        achieved, bound = -achieved, None if bound is None else -bound
    report = SolverReport(solver, status, achieved, bound, relative, time.perf_counter() - started)
    picked = [int(layer.useful[place]) for layer, place in zip(program.choices, places, strict=True)]
    return Solution(picked, widths, report)


def _exact(program: Program, terms: _Terms) -> list[int] | None:
    """The allocation of least value by dynamic programming.

    With two budgets, the solution for one of them is the solution for both if it is within the other one.

    Returns:
        The index of each layer's candidate among the useful ones; None: it takes a solver.
    """
    found = least_value(terms.value, terms.size, program.budget_bytes)
    most = program.memory_bytes
    if found is None or most is None or _sum(terms.memory, found) <= most:
        return found
    found = least_value(terms.value, terms.memory, most)
    return found if found is not None and _sum(terms.size, found) <= program.budget_bytes else None


def _sum(values: Sequence[NDArray[np.int64]], places: Sequence[int]) -> int:
    return sum(int(own[place]) for own, place in zip(values, places, strict=True))


def _total(values: Sequence[NDArray[np.int64] | None], places: Sequence[int]) -> int | None:
    known = [own for own in values if own is not None]
    return _sum(known, places) if len(known) == len(values) else None


class _Terms:
    """Coefficients of a program, of useful candidates alone, for minimisation.

    Attributes:
        value: ``(useful,)`` per layer, objective coefficients.
        size: ``(useful,)`` per layer, bytes.
        memory: ``(useful,)`` per layer, bytes in the memory of the chosen runtime; zeros if that is not bounded.
        load: ``(useful,)`` per layer, bit operations per bit of its input; zeros if no widths are chosen.
        group_value: ``(choices,)`` per group, objective coefficients.
    """

    def __init__(self, program: Program) -> None:
        choices, groups = program.choices, () if program.widths is None else program.widths.groups
        self.value = [_value(layer.cost[layer.useful], program.objective) for layer in choices]
        self.size = [layer.size[layer.useful] for layer in choices]
        self.memory = [
            np.zeros(len(layer.useful), dtype=np.int64)
            if layer.memory is None or program.memory_bytes is None
            else layer.memory[layer.useful]
            for layer in choices
        ]
        self.load = [
            np.zeros(len(layer.useful)) if program.widths is None else _load(layer)[layer.useful] for layer in choices
        ]
        self.group_value = [_value(group.cost, program.objective) for group in groups]
        self._budget = program.budget_bytes

    @cached_property
    def scale(self) -> float:
        """Factor of the objective in the solver.

        Solvers use absolute tolerances near 1e-6, and summed NMSEs can be smaller: with it, the objective of a simple
        feasible solution is about a thousand.
        """
        return 1e3 / max(self._simple_value(self._budget), 1e-300)

    def _simple_value(self, budget: int) -> float:
        """Magnitude of the objective if every layer keeps its share of the budget; for groups, the median."""
        largest = sum(int(size.max()) for size in self.size)
        share = min(1.0, budget / largest)
        total = 0.0
        for value, size in zip(self.value, self.size, strict=True):
            fitting = value[size <= max(size.min(), share * size.max())]
            total += float(np.abs(fitting[fitting.argmin()]))
        return total + sum(float(np.median(np.abs(value))) for value in self.group_value)


def _value(cost: Floats, objective: Objective) -> Floats:
    return cost if objective == "nsr" else -1.0 / np.maximum(cost, SMALLEST_NMSE)


def _load(layer: Choices) -> Floats:
    if layer.load is None:
        raise ValueError(f"layer {layer.layer}: candidates need loads if bit-widths of activations are chosen")
    return layer.load


def _build(
    program: Program, terms: _Terms
) -> tuple[pulp.LpProblem, list[list[pulp.LpVariable]], list[list[pulp.LpVariable]]]:
    """The program, with its variables x by layer and useful candidate, and y by group and width.

    Solvers get variables in the order of their names and rows in the order in which they are added; this order decides
    between equally good solutions.
    """
    import pulp

    widths = program.widths
    groups = () if widths is None else widths.groups
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = [
        [problem.add_variable(f"x_{layer}_{place}", cat=pulp.LpBinary) for place in range(len(value))]
        for layer, value in enumerate(terms.value)
    ]
    y = [
        [problem.add_variable(f"y_{group}_{width}", cat=pulp.LpBinary) for width in own.widths.tolist()]
        for group, own in enumerate(groups)
    ]
    problem += pulp.LpAffineExpression(
        (variable, float(cost * terms.scale))
        for variables, value in zip([*x, *y], [*terms.value, *terms.group_value], strict=True)
        for variable, cost in zip(variables, value, strict=True)
    )
    for variables in (*x, *y):
        problem += pulp.LpAffineExpression((variable, 1) for variable in variables) == 1
    # Memory and compute are relative to their budgets, for the same reason as the objective's scale.
    bounded = [(terms.size, program.budget_bytes)]
    bounded += [] if program.memory_bytes is None else [(terms.memory, program.memory_bytes)]
    for measured, most in bounded:
        problem += (
            pulp.LpAffineExpression(
                (variable, float(size) / most)
                for variables, sizes in zip(x, measured, strict=True)
                for variable, size in zip(variables, sizes, strict=True)
            )
            <= 1
        )
    if widths is not None:
        _add_compute(problem, widths, terms, x, y)
    return problem, x, y


def _add_compute(
    problem: pulp.LpProblem,
    widths: WidthChoices,
    terms: _Terms,
    x: list[list[pulp.LpVariable]],
    y: list[list[pulp.LpVariable]],
) -> None:
    """The linking variables, ``z_ℓca = x_ℓc y_ga``, and the compute budget."""
    import pulp

    operations = [
        (variable, float(value) / widths.compute)
        for group, own in zip(widths.groups, y, strict=True)
        for variable, value in zip(own, group.operations, strict=True)
    ]
    for layer, (own, load) in enumerate(zip(x, terms.load, strict=True)):
        offered, switches = widths.groups[widths.group_of[layer]].widths.tolist(), y[widths.group_of[layer]]
        z = [
            [problem.add_variable(f"z_{layer}_{place}_{width}", 0, 1) for width in offered] for place in range(len(own))
        ]
        for variable, parts, per_bit in zip(own, z, load, strict=True):
            problem += pulp.LpAffineExpression((part, 1) for part in parts) == variable
            operations += [
                (part, float(per_bit) * width / widths.compute) for part, width in zip(parts, offered, strict=True)
            ]
        for place, switch in enumerate(switches):
            problem += pulp.LpAffineExpression((parts[place], 1) for parts in z) == switch
    problem += pulp.LpAffineExpression(operations) <= 1


def _run(problem: pulp.LpProblem, solver: SolverName, time_limit: float, gap: float) -> tuple[str | None, float | None]:
    """Solve on one thread, so that the result is reproducible.

    Returns:
        ``optimal`` or ``feasible``, None if no solution was found; and the best bound, None if there is none.
    """
    import pulp

    if solver == "highs":
        problem.solve(pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap, threads=1))
    else:
        bundled = pulp.PULP_CBC_CMD.pulp_cbc_path  # the CBC that comes with PuLP, not an installed one
        problem.solve(pulp.COIN_CMD(path=bundled, msg=False, timeLimit=time_limit, gapRel=gap, threads=1))
    known = {pulp.LpSolutionOptimal: "optimal", pulp.LpSolutionIntegerFeasible: "feasible"}
    status = known.get(problem.sol_status)
    bound = float(problem.solverModel.getInfo().mip_dual_bound) if status and solver == "highs" else None
    return status, bound if bound is not None and np.isfinite(bound) else None


def _nothing_found(program: Program, solver: SolverName, time_limit: float, problem: pulp.LpProblem) -> str:
    import pulp

    status = pulp.LpStatus[problem.status]
    if program.widths is None and program.memory_bytes is not None:
        return (
            f"no allocation within {byte_count(program.budget_bytes)} and {byte_count(program.memory_bytes)} of memory "
            f"was found ({solver}: {status}); allow more of either, or raise search.time_limit"
        )
    if program.widths is None:
        return f"{solver} found no allocation within {time_limit} s (status {status}); raise search.time_limit"
    return (
        f"no allocation within {byte_count(program.budget_bytes)} and {program.widths.compute:.4g} bit operations per "
        f"sample was found ({solver}: {status}); allow more of either, or raise search.time_limit"
    )


def _highest(variables: Sequence[pulp.LpVariable]) -> int:
    """Index of the variable that the solver set to 1."""
    return int(np.argmax([variable.value() or 0.0 for variable in variables]))


def _repaired(program: Program, terms: _Terms, places: list[int], widths: list[int]) -> tuple[list[int], list[int]]:
    """Undo a solver's tolerance: while a budget is exceeded, take the cheapest step that lowers the excess.

    A step changes one layer's candidate or one group's width. It must not exceed another budget, nor increase its
    excess.

    Args:
        program: the solved program.
        terms: its coefficients.
        places: index of each layer's candidate among its useful ones.
        widths: index of each group's width.

    Raises:
        BudgetError: no such step is left.
    """
    places, widths, layers = list(places), list(widths), len(places)
    chosen = program.widths or WidthChoices((), [0] * layers, 0.0)
    groups, group_of, most = chosen.groups, chosen.group_of, chosen.compute * (1 + COMPUTE_TOLERANCE)
    most_held = 0 if program.memory_bytes is None else program.memory_bytes
    budgets = (program.budget_bytes, most_held, most)
    while True:
        bits = [float(group.widths[place]) for group, place in zip(groups, widths, strict=True)] or [0.0]
        reading = [0.0] * len(bits)  # per group: bit operations per bit of its width, of the layers that read it
        for load, place, read in zip(terms.load, places, group_of, strict=True):
            reading[read] += float(load[place])
        size, held = _sum(terms.size, places), _sum(terms.memory, places)
        operations = sum(float(group.operations[place]) for group, place in zip(groups, widths, strict=True))
        operations += sum(own * width for own, width in zip(reading, bits, strict=True))
        excess = [size > program.budget_bytes, held > most_held, operations > most]
        if not any(excess):
            return places, widths
        over = excess.index(True)  # which of the three is lowered
        steps: list[tuple[float, int, int]] = []  # rise of the objective, layer or group, place
        for index, (value, sizes, memory, load) in enumerate(
            zip(terms.value, terms.size, terms.memory, terms.load, strict=True)
        ):
            place = places[index]
            more = (sizes - sizes[place], memory - memory[place], (load - load[place]) * bits[group_of[index]])
            allowed = more[over] < 0
            for own, now, limit in zip(more, (size, held, operations), budgets, strict=True):
                allowed = allowed & (now + own <= max(limit, now))
            steps += _cheapest(value, place, allowed, index)
        for index, group in enumerate(groups if over == 2 else ()):
            place = widths[index]
            more_operations = group.operations - group.operations[place]
            more_operations = more_operations + reading[index] * (group.widths - group.widths[place])
            steps += _cheapest(terms.group_value[index], place, more_operations < 0, layers + index)
        if not steps:
            raise BudgetError(
                "the solver's allocation exceeds a budget by its tolerance and cannot be repaired: "
                "raise the budget slightly"
            )
        _, index, place = min(steps)
        if index < layers:
            places[index] = place
        else:
            widths[index - layers] = place


def _cheapest(value: Floats, place: int, allowed: NDArray[np.bool_], index: int) -> list[tuple[float, int, int]]:
    """The step to the cheapest allowed choice, as (rise, index, choice); empty if none is allowed."""
    kept = np.flatnonzero(allowed)
    if not len(kept):
        return []
    rise = value[kept] - value[place]
    return [(float(rise.min()), index, int(kept[rise.argmin()]))]
