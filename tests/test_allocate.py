"""The integer program against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mlorq.allocation.program import Choices, allocate, smallest_bytes
from mlorq.errors import BudgetError


def random_choices(layers: int, candidates: int, seed: int, magnitude: float = 1.0) -> list[Choices]:
    rng = np.random.default_rng(seed)
    return [
        Choices(
            f"layer{index}",
            magnitude * 10.0 ** rng.uniform(-5, 0, candidates),
            rng.integers(10, 1000, candidates).astype(np.int64),
        )
        for index in range(layers)
    ]


def exhaustive(choices: list[Choices], budget: int, objective: str) -> float:
    best = np.inf
    for picked in itertools.product(*(range(len(layer.cost)) for layer in choices)):
        if sum(layer.size[i] for layer, i in zip(choices, picked, strict=True)) <= budget:
            costs = np.array([layer.cost[i] for layer, i in zip(choices, picked, strict=True)])
            best = min(best, costs.sum() if objective == "nsr" else -(1 / costs).sum())
    return best


@pytest.mark.parametrize("solver", ["highs", "cbc"])
@pytest.mark.parametrize("objective", ["nsr", "sqnr"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-7])
@pytest.mark.parametrize("tightness", [0.05, 0.4, 1.0])
def test_optimum_of_exhaustive_search(solver, objective, magnitude, tightness, seed):
    choices = random_choices(5, 6, seed, magnitude)
    smallest = smallest_bytes(choices)
    largest = sum(int(layer.size.max()) for layer in choices)
    budget = int(smallest + tightness * (largest - smallest))
    picked, report = allocate(choices, budget, objective=objective, solver=solver, gap=0.0)
    assert sum(layer.size[i] for layer, i in zip(choices, picked, strict=True)) <= budget
    costs = np.array([layer.cost[i] for layer, i in zip(choices, picked, strict=True)])
    found = costs.sum() if objective == "nsr" else -(1 / costs).sum()
    assert found == pytest.approx(exhaustive(choices, budget, objective), rel=1e-6)
    assert report.objective == pytest.approx(abs(found), rel=1e-6)
    assert report.name == solver
    assert report.status == "optimal"
    if solver == "highs":
        assert report.bound is not None
        assert report.bound == pytest.approx(report.objective, rel=1e-3)
    else:
        assert report.bound is None
        assert report.gap is None


def test_impossible_budget_names_the_smallest(seed):
    choices = random_choices(3, 4, seed)
    smallest = smallest_bytes(choices)
    picked, _ = allocate(choices, smallest)
    assert sum(layer.size[i] for layer, i in zip(choices, picked, strict=True)) == smallest
    with pytest.raises(BudgetError, match=str(smallest)):
        allocate(choices, smallest - 1)


def test_layer_without_influence_takes_the_smallest_candidate():
    free = Choices("pooler", np.zeros(4), np.array([70, 40, 90, 60]))
    costly = Choices("other", np.array([1.0, 0.1]), np.array([10, 20]))
    picked, _ = allocate([free, costly], 10_000)
    assert picked == [1, 1]


def test_large_program_is_solved_close_to_its_bound(seed):
    rng = np.random.default_rng(seed)
    choices = []
    for index in range(60):
        size = np.sort(rng.integers(1000, 100_000, 300))[::-1].astype(np.int64)
        choices.append(Choices(f"l{index}", np.sort(rng.uniform(1e-6, 1e-2, 300)), size))
    budget = int(0.4 * sum(int(layer.size.max()) for layer in choices))
    _, report = allocate(choices, budget, gap=1e-4)
    assert report.gap is not None
    assert report.gap <= 1.1e-4
