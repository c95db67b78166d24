"""Weights and activations in one integer program, under a memory and a compute budget (METHOD 8).

Every layer gets a candidate and every group of activations (the input of layers that read one tensor, or the operands
of one product) a code width:

    min Σ_ℓc x_ℓc cost_ℓc + Σ_ga y_ga cost_ga
    subject to one candidate a layer and one width a group, Σ_ℓc x_ℓc bytes_ℓc ≤ budget,
    Σ_ℓca z_ℓca load_ℓc · a + Σ_ga y_ga ops_ga ≤ compute.

A bit operation is a product of one bit of a weight with one of an activation: a multiply-accumulate of a b-bit weight
and an a-bit input counts ``a b`` of them, so that a layer's load a bit of its input is its multiply-accumulates times
the bits of its weights, ``load_ℓc``. That a candidate and a width meet is ``z_ℓca``, with ``Σ_a z_ℓca = x_ℓc`` and
``Σ_c z_ℓca = y_ga``: where x and y are whole numbers, z is their product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pulp

from mlorq.allocation.program import Choices, SolverName, SolverReport, require_bytes, solve_program
from mlorq.errors import BudgetError
from mlorq.forms.base import FORMS, Candidate, Shape
from mlorq.models.layers import Layer


@dataclass(frozen=True)
class Group:
    """Activations that share a code width.

    Attributes:
        name: of the tensor, or of the product.
        widths: ``(choices,)`` code widths.
        cost: ``(choices,)`` what the output costs with these activations alone quantized.
        operations: ``(choices,)`` bit operations of the product itself; zeros for inputs of layers.
    """

    name: str
    widths: np.ndarray
    cost: np.ndarray
    operations: np.ndarray


def weight_load(layer: Layer, candidate: Candidate) -> float:
    """Bit operations of a layer per sample and bit of its input (``Form.bit_operations``)."""
    shape = Shape(layer.out_features, layer.in_features, layer.groups)
    return FORMS[candidate.form].bit_operations(candidate, shape, layer.macs / layer.params)


def allocate_jointly(
    choices: Sequence[Choices],
    loads: Sequence[np.ndarray],
    groups: Sequence[Group],
    group_of: Sequence[int],
    budget_bytes: int,
    compute: float,
    *,
    solver: SolverName = "highs",
    time_limit: float = 120.0,
    gap: float = 1e-4,
) -> tuple[list[int], list[int], SolverReport]:
    """Choose a candidate for every layer and a width for every group.

    Args:
        choices: the layers and their candidates.
        loads: ``(candidates,)`` a layer: ``weight_load`` of each.
        groups: the activations.
        group_of: index of the group that each layer reads.
        budget_bytes: most bytes of all layers together.
        compute: most bit operations a sample.
        solver: ``highs`` or ``cbc``.
        time_limit: seconds.
        gap: relative gap at which the solver may stop.

    Returns:
        The index of every layer's candidate, of every group's width, and the solver's report.

    Raises:
        BudgetError: nothing fits the one or the other budget; the smallest possible is named where it is known.
    """
    require_bytes(choices, budget_bytes)
    least = _least_operations(loads, groups, group_of)
    if compute < least:
        raise BudgetError(
            f"activations.compute: {compute:.4g} bit operations a sample are too few: the least possible is {least:.4g}"
        )
    started = time.perf_counter()
    kept = [_useful(layer, load) for layer, load in zip(choices, loads, strict=True)]
    scale = 1e3 / max(sum(float(np.median(layer.cost)) for layer in choices), 1e-300)
    problem = pulp.LpProblem("joint", pulp.LpMinimize)
    x = [
        {row: pulp.LpVariable(f"x_{index}_{row}", cat=pulp.LpBinary) for row in rows.tolist()}
        for index, rows in enumerate(kept)
    ]
    y = [
        [pulp.LpVariable(f"y_{index}_{width}", cat=pulp.LpBinary) for width in group.widths.tolist()]
        for index, group in enumerate(groups)
    ]
    cost = [
        (variable, scale * float(choices[index].cost[row]))
        for index, own in enumerate(x)
        for row, variable in own.items()
    ]
    cost += [
        (variable, scale * float(value))
        for group, own in zip(groups, y, strict=True)
        for variable, value in zip(own, group.cost, strict=True)
    ]
    problem += pulp.LpAffineExpression(cost)
    for variables in (*(list(own.values()) for own in x), *y):
        problem += pulp.LpAffineExpression((variable, 1) for variable in variables) == 1
    problem += (
        pulp.LpAffineExpression(
            (variable, float(choices[index].size[row]) / budget_bytes)
            for index, own in enumerate(x)
            for row, variable in own.items()
        )
        <= 1
    )
    operations = [
        (variable, float(value) / compute)
        for group, own in zip(groups, y, strict=True)
        for variable, value in zip(own, group.operations, strict=True)
    ]
    for index, own in enumerate(x):
        widths, switches = groups[group_of[index]].widths.tolist(), y[group_of[index]]
        z = {row: [pulp.LpVariable(f"z_{index}_{row}_{width}", 0, 1) for width in widths] for row in own}
        for row, variable in own.items():
            problem += pulp.LpAffineExpression((part, 1) for part in z[row]) == variable
            operations += [
                (part, float(loads[index][row]) * width / compute) for part, width in zip(z[row], widths, strict=True)
            ]
        for place, switch in enumerate(switches):
            problem += pulp.LpAffineExpression((z[row][place], 1) for row in own) == switch
    problem += pulp.LpAffineExpression(operations) <= 1
    status, bound = solve_program(problem, solver, time_limit, gap)
    if status is None:
        raise BudgetError(
            f"no allocation within {budget_bytes} bytes and {compute:.4g} bit operations a sample was found "
            f"({solver}: {pulp.LpStatus[problem.status]}); allow more of either, or raise search.time_limit"
        )
    picked = [max(own, key=lambda row: own[row].value() or 0.0) for own in x]
    widths_picked = [int(np.argmax([variable.value() or 0.0 for variable in own])) for own in y]
    _repair(choices, loads, groups, group_of, picked, widths_picked, budget_bytes, compute)
    achieved = float(sum(layer.cost[row] for layer, row in zip(choices, picked, strict=True)))
    achieved += float(sum(group.cost[place] for group, place in zip(groups, widths_picked, strict=True)))
    bound = None if bound is None else bound / scale
    relative = None if bound is None else abs(achieved - bound) / max(abs(achieved), 1e-300)
    report = SolverReport(solver, status, achieved, bound, relative, time.perf_counter() - started)
    return picked, widths_picked, report


def operations_of(
    loads: Sequence[np.ndarray],
    groups: Sequence[Group],
    group_of: Sequence[int],
    picked: Sequence[int],
    widths: Sequence[int],
) -> float:
    """Bit operations a sample of an allocation."""
    products = sum(float(group.operations[place]) for group, place in zip(groups, widths, strict=True))
    return products + sum(
        float(load[row]) * float(groups[group].widths[widths[group]])
        for load, row, group in zip(loads, picked, group_of, strict=True)
    )


def _least_operations(loads: Sequence[np.ndarray], groups: Sequence[Group], group_of: Sequence[int]) -> float:
    narrowest = [int(group.widths.argmin()) for group in groups]
    return operations_of(loads, groups, group_of, [int(load.argmin()) for load in loads], narrowest)


def _useful(layer: Choices, load: np.ndarray) -> np.ndarray:
    """Candidates that no other one of the layer is as good as, in cost, memory and load, and better in one of them."""
    measures = np.stack([layer.cost, layer.size.astype(float), load])
    no_worse = (measures[:, :, None] <= measures[:, None, :]).all(0)  # [i, j]: i is as good as j in all
    better = no_worse & ~no_worse.T
    twins = np.triu(no_worse & no_worse.T, 1)  # of equal ones the first stays
    return np.flatnonzero(~(better | twins).any(0))


def _repair(
    choices: Sequence[Choices],
    loads: Sequence[np.ndarray],
    groups: Sequence[Group],
    group_of: Sequence[int],
    picked: list[int],
    widths: list[int],
    budget: int,
    compute: float,
) -> None:
    """Undo a solver's tolerance: while a budget is exceeded, the cheapest step that lowers what is exceeded."""

    def excess() -> tuple[bool, bool]:
        size = sum(int(layer.size[row]) for layer, row in zip(choices, picked, strict=True))
        return size > budget, operations_of(loads, groups, group_of, picked, widths) > compute * (1 + 1e-9)

    while any(excess()):
        over_memory, _ = excess()
        best: tuple[float, int, int] | None = None
        for index, layer in enumerate(choices):
            row, load = picked[index], loads[index]
            smaller = (layer.size < layer.size[row]) if over_memory else (load < load[row])
            allowed = np.flatnonzero(smaller & (layer.size <= layer.size[row]) & (load <= load[row]))
            if len(allowed):
                rise = layer.cost[allowed] - layer.cost[row]
                step = (float(rise.min()), index, int(allowed[rise.argmin()]))
                best = step if best is None or step < best else best
        if best is None:
            raise BudgetError("the solver's allocation exceeds a budget by its tolerance, and no smaller step is left")
        picked[best[1]] = best[2]
