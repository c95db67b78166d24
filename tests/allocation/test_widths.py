"""Weights and activations in one program: against trying everything, and its two budgets."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from mlorq.activations.compute import checked_compute, parse_compute
from mlorq.allocation.choices import Choices, Group, WidthChoices
from mlorq.allocation.program import Program, _repaired, _Terms, solve
from mlorq.allocation.weight_load import weight_load
from mlorq.errors import BudgetError, ConfigError
from mlorq.forms.base import Candidate
from mlorq.models.layer_list import Layer
from mlorq.numbers import byte_count

PICKED = list(itertools.product(range(4), repeat=3))
WIDTHS = list(itertools.product(range(3), repeat=3))


def problem(seed: int, magnitude: float = 0.1) -> Program:
    """Three layers, of which two read one tensor, and a product; budgets that bind nothing."""
    draw = np.random.default_rng(seed)
    choices = []
    for index in range(3):
        bits = np.sort(draw.choice(np.arange(2, 9), 4, replace=False))[::-1]
        cost = np.sort(draw.random(4)) * magnitude
        size = (bits * draw.integers(90, 110, 4)).astype(np.int64)
        choices.append(Choices(f"layer{index}", cost, size, bits * draw.uniform(900, 1100, 4)))
    widths = np.array([4, 6, 8])
    groups = [
        Group(name, widths, np.sort(draw.random(3))[::-1] * magnitude, widths**2 * own)
        for name, own in (("a", 0.0), ("b", 0.0), ("product", 50.0))
    ]
    return Program(choices, 10**9, WidthChoices(groups, [0, 0, 1], 1e12))


def within(program: Program, memory: float, compute: float) -> Program:
    """The same with shares of the most bytes and the most bit operations as budgets."""
    assert program.widths is not None
    most = sum(int(layer.size.max()) for layer in program.choices)
    largest = max(program.operations_of(picked, widths) for picked in PICKED for widths in WIDTHS)
    return replace(
        program, budget_bytes=int(memory * most), widths=replace(program.widths, compute=float(compute * largest))
    )


def worth(program: Program, picked, widths) -> float:
    """What the program minimises."""
    assert program.widths is not None
    costs = [layer.cost[row] for layer, row in zip(program.choices, picked, strict=True)]
    costs += [group.cost[place] for group, place in zip(program.widths.groups, widths, strict=True)]
    return float(np.sum(costs) if program.objective == "nsr" else -np.sum(1 / np.array(costs)))


def exhaustive(program: Program) -> float | None:
    """The least worth of all allocations within the budgets; None where there is none."""
    assert program.widths is not None
    limit = program.widths.compute
    return min(
        (
            worth(program, picked, widths)
            for picked in PICKED
            if program.bytes_of(picked) <= program.budget_bytes
            for widths in WIDTHS
            if program.operations_of(picked, widths) <= limit
        ),
        default=None,
    )


@pytest.mark.parametrize("solver", ["highs", "cbc"])
@pytest.mark.parametrize("objective", ["nsr", "sqnr"])
@pytest.mark.parametrize("magnitude", [0.1, 1e-7])
def test_it_is_the_best_of_all(seed, solver, objective, magnitude):
    whole = replace(problem(seed, magnitude), objective=objective)
    for memory, compute in ((0.6, 0.4), (0.8, 0.3), (0.7, 0.6), (1.0, 1.0)):
        program = within(whole, memory, compute)
        best = exhaustive(program)
        if best is None:
            with pytest.raises(BudgetError):
                solve(program, solver=solver)
            continue
        solution = solve(program, solver=solver, gap=0.0)
        assert program.bytes_of(solution.picked) <= program.budget_bytes
        assert program.widths is not None
        assert program.operations_of(solution.picked, solution.widths) <= program.widths.compute * (1 + 1e-9)
        assert worth(program, solution.picked, solution.widths) == pytest.approx(best, rel=1e-6)
        assert solution.report.objective == pytest.approx(abs(best), rel=1e-6)
        costs = replace(program, objective="nsr")
        assert program.cost_of(solution.picked, solution.widths) == pytest.approx(
            worth(costs, solution.picked, solution.widths)
        )


def test_the_objective_decides(seed):
    """Under one pair of budgets the two objectives have different optima."""
    different = 0
    for index in range(10):
        program = within(problem(seed + index), 0.7, 0.5)
        if exhaustive(program) is None:
            continue
        solutions = [solve(replace(program, objective=objective), gap=0.0) for objective in ("nsr", "sqnr")]
        different += (solutions[0].picked, solutions[0].widths) != (solutions[1].picked, solutions[1].widths)
    assert different


def test_without_a_binding_compute_budget_the_layers_are_those_of_weights_alone(seed):
    program = within(problem(seed), 0.7, 1.0)
    joint = solve(program, gap=0.0)
    alone = solve(Program(program.choices, program.budget_bytes), gap=0.0)
    assert sum(layer.cost[row] for layer, row in zip(program.choices, joint.picked, strict=True)) == pytest.approx(
        sum(layer.cost[row] for layer, row in zip(program.choices, alone.picked, strict=True))
    )


def test_budgets_that_cannot_be_met_are_named(seed):
    program = problem(seed)
    assert program.widths is not None
    smallest = sum(int(layer.size.min()) for layer in program.choices)
    with pytest.raises(BudgetError, match=re.escape(f"the smallest possible is {byte_count(smallest)}")):
        solve(replace(program, budget_bytes=smallest - 1))
    least = min(program.operations_of(picked, widths) for picked in PICKED for widths in WIDTHS)
    assert program.least_operations() == pytest.approx(least)
    with pytest.raises(BudgetError, match=re.escape(f"the least possible is {least:.4g}")):
        solve(replace(program, widths=replace(program.widths, compute=0.99 * least)))


def test_widths_need_the_loads_of_all_candidates(seed):
    program = problem(seed)
    choices = [Choices(layer.layer, layer.cost, layer.size) for layer in program.choices]
    with pytest.raises(ValueError, match="layer0"):
        solve(replace(program, choices=choices))


def test_repair_keeps_both_budgets(seed):
    """From allocations far beyond a budget, however a solver came to them."""
    repaired = 0
    for index in range(10):
        for memory, compute in ((0.7, 0.6), (0.6, 0.9), (0.9, 0.5)):
            program = within(problem(seed + index), memory, compute)
            assert program.widths is not None
            terms = _Terms(program)
            start = [int(size.argmax()) for size in terms.size]
            try:
                places, widths = _repaired(program, terms, start, [2, 2, 2])
            except BudgetError:
                continue  # greedy steps can end where no single one helps
            picked = [int(layer.useful[place]) for layer, place in zip(program.choices, places, strict=True)]
            assert program.bytes_of(picked) <= program.budget_bytes
            assert program.operations_of(picked, widths) <= program.widths.compute * (1 + 1e-9)
            repaired += 1
    assert repaired > 15


def test_loads_count_what_is_multiplied():
    layer = Layer("l", "linear", 20, 30, 1, 7 * 600, 0, 0, 0)
    assert weight_load(layer, Candidate("Q", bits=3)) == 7 * 600 * 3
    low_rank = Candidate("LR", bits_a=4, bits_b=6, rank=5)
    assert weight_load(layer, low_rank) == 7 * (20 * 5 * 4 + 5 * 30 * 6)
    both = Candidate("QLR", bits=2, bits_a=4, bits_b=6, rank=5)
    assert weight_load(layer, both) == 7 * 600 * 2 + weight_load(layer, low_rank)


@pytest.mark.parametrize(
    ("text", "expected"), [("4x8", 4 * 8 * 100 + 64 * 10), ("3.5x4", 1400 + 160), ("20G", 2e10), ("1.5 Tbops", 1.5e12)]
)
def test_compute_budgets(text, expected):
    assert checked_compute(text) == text
    assert parse_compute(text, 100, 10) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["four", "4by4", "-3G", "0"])
def test_nonsense_is_no_compute_budget(text):
    with pytest.raises(ConfigError, match=rf"activations\.compute: '{text}' .*4x4.*20G"):
        parse_compute(text, 100, 10)
    with pytest.raises(ValueError, match=text):
        checked_compute(text)
