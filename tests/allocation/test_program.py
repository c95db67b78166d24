"""The integer program against exhaustive search, and its two budgets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from mlorq.allocation.choices import Choices, SearchSpace, smallest_bytes, smallest_memory
from mlorq.allocation.program import Objective, Program, _repaired, _Terms, solve
from mlorq.artifacts.schemas import ALLOCATION
from mlorq.costs.pareto import pareto_front
from mlorq.errors import BudgetError
from mlorq.numbers import byte_count


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


def every_pick(choices: list[Choices]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(layer.cost)) for layer in choices))


def worth(program: Program, picked: tuple[int, ...] | list[int]) -> float:
    """What the program minimises."""
    costs = np.array([layer.cost[row] for layer, row in zip(program.choices, picked, strict=True)])
    return float(costs.sum() if program.objective == "nsr" else -(1 / costs).sum())


def exhaustive(program: Program) -> float:
    choices = list(program.choices)
    return min(
        worth(program, picked) for picked in every_pick(choices) if program.bytes_of(picked) <= program.budget_bytes
    )


@pytest.mark.parametrize("solver", ["exact", "highs", "cbc"])
@pytest.mark.parametrize("objective", ["nsr", "sqnr"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-7])
@pytest.mark.parametrize("tightness", [0.05, 0.4, 1.0])
def test_optimum_of_exhaustive_search(solver, objective, magnitude, tightness, seed):
    choices = random_choices(5, 6, seed, magnitude)
    smallest = smallest_bytes(choices)
    largest = sum(int(layer.size.max()) for layer in choices)
    program = Program(choices, int(smallest + tightness * (largest - smallest)), objective=objective)
    solution = solve(program, solver=solver, gap=0.0)
    assert program.bytes_of(solution.picked) <= program.budget_bytes
    assert solution.widths == []
    found, report = worth(program, solution.picked), solution.report
    assert found == pytest.approx(exhaustive(program), rel=1e-6)
    assert report.objective == pytest.approx(abs(found), rel=1e-6)
    assert report.name == solver
    assert report.status == "optimal"
    if solver != "cbc":
        assert report.bound is not None
        assert report.bound == pytest.approx(report.objective, rel=1e-3)
    else:
        assert report.bound is None
        assert report.gap is None


@pytest.mark.parametrize("objective", ["nsr", "sqnr"])
def test_many_random_instances(objective: Objective, seed: int) -> None:
    """Few layers, ties among costs and sizes, layers with one candidate, budgets down to the smallest possible."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        choices = [
            Choices(
                f"layer{index}",
                rng.integers(1, 8, count) * 10.0 ** float(rng.uniform(-6, 0)),
                rng.integers(1, 9, count).astype(np.int64),
            )
            for index, count in enumerate(rng.integers(1, 6, int(rng.integers(1, 5))))
        ]
        smallest, largest = smallest_bytes(choices), sum(int(layer.size.max()) for layer in choices)
        program = Program(choices, int(rng.integers(smallest, largest + 1)), objective=objective)
        solution = solve(program, gap=0.0)
        assert program.bytes_of(solution.picked) <= program.budget_bytes
        assert worth(program, solution.picked) == pytest.approx(exhaustive(program), rel=1e-6)
        with pytest.raises(BudgetError, match=re.escape(f"the smallest possible is {byte_count(smallest)}")):
            solve(replace(program, budget_bytes=smallest - 1))


def test_impossible_budget_names_the_smallest(seed):
    choices = random_choices(3, 4, seed)
    smallest = smallest_bytes(choices)
    program = Program(choices, smallest)
    assert program.bytes_of(solve(program).picked) == smallest
    with pytest.raises(BudgetError, match=str(smallest)):
        solve(Program(choices, smallest - 1))


def test_layer_without_influence_takes_the_smallest_candidate():
    free = Choices("pooler", np.zeros(4), np.array([70, 40, 90, 60]))
    costly = Choices("other", np.array([1.0, 0.1]), np.array([10, 20]))
    assert solve(Program([free, costly], 10_000)).picked == [1, 1]


def test_large_program_is_solved_close_to_its_bound(seed):
    rng = np.random.default_rng(seed)
    choices = []
    for index in range(60):
        size = np.sort(rng.integers(1000, 100_000, 300))[::-1].astype(np.int64)
        choices.append(Choices(f"l{index}", np.sort(rng.uniform(1e-6, 1e-2, 300)), size))
    budget = int(0.4 * sum(int(layer.size.max()) for layer in choices))
    report = solve(Program(choices, budget), gap=1e-4).report
    assert report.gap is not None
    assert report.gap <= 1.1e-4


@pytest.mark.parametrize("solver", ["exact", "highs", "cbc"])
def test_nothing_that_the_solver_library_will_drop_is_used(solver, seed, recwarn):
    solve(Program(random_choices(3, 4, seed), 10**6), solver=solver)
    assert not [one for one in recwarn.list if issubclass(one.category, DeprecationWarning)]


def test_repair_takes_the_cheapest_step_until_the_budget_holds(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        choices = random_choices(4, 5, int(rng.integers(10**6)))
        program = Program(choices, int(smallest_bytes(choices) * 1.3))
        terms = _Terms(program)
        start = [int(size.argmax()) for size in terms.size]  # the most expensive in bytes
        places, _ = _repaired(program, terms, start, [])
        assert sum(int(size[place]) for size, place in zip(terms.size, places, strict=True)) <= program.budget_bytes
        assert _repaired(program, terms, places, []) == (places, [])  # nothing is left to do
    # Two bytes over: of the steps that save at least one, the one that costs least comes first.
    choices = [
        Choices("a", np.array([0.0, 0.5]), np.array([10, 9])),
        Choices("b", np.array([0.0, 0.1]), np.array([10, 8])),
    ]
    program = Program(choices, 18)
    assert _repaired(program, _Terms(program), [0, 0], []) == ([0, 1], [])


# -- a second budget: the memory of a runtime ------------------------------------------------------------------------


def held_choices(layers: int, candidates: int, rng: np.random.Generator) -> list[Choices]:
    """Choices of which small candidates are not the ones that take little memory."""
    return [
        Choices(
            f"layer{index}",
            10.0 ** rng.uniform(-5, 0, candidates),
            rng.integers(10, 1000, candidates),
            memory=rng.integers(10, 1000, candidates),
        )
        for index in range(layers)
    ]


@pytest.mark.parametrize("solver", ["exact", "highs", "cbc"])
@pytest.mark.parametrize("objective", ["nsr", "sqnr"])
def test_both_budgets_against_exhaustive_search(solver, objective, seed):
    rng = np.random.default_rng(seed)
    impossible = 0
    for _ in range(12):
        choices = held_choices(4, 5, rng)
        share = rng.uniform(0.05, 0.9, 2)
        least = (smallest_bytes(choices), smallest_memory(choices))
        most = (sum(int(one.size.max()) for one in choices), sum(int(one.memory.max()) for one in choices))
        limits = [int(low + part * (high - low)) for low, high, part in zip(least, most, share, strict=True)]
        program = Program(choices, limits[0], objective=objective, memory_bytes=limits[1])
        fitting = [
            picked
            for picked in every_pick(choices)
            if program.bytes_of(picked) <= limits[0] and program.memory_of(picked) <= limits[1]
        ]
        if not fitting:
            impossible += 1
            with pytest.raises(BudgetError, match="of memory was found"):
                solve(program, solver=solver, gap=0.0)
            continue
        picked = solve(program, solver=solver, gap=0.0).picked
        assert tuple(picked) in set(fitting)
        assert worth(program, picked) == pytest.approx(min(worth(program, one) for one in fitting), rel=1e-6)
    assert impossible < 12


def test_too_little_memory_names_the_least(seed):
    choices = held_choices(3, 4, np.random.default_rng(seed))
    least = smallest_memory(choices)
    with pytest.raises(BudgetError, match=re.escape(f"the smallest possible is {byte_count(least)}")):
        solve(Program(choices, 10**6, memory_bytes=least - 1))
    found = solve(Program(choices, 10**6, memory_bytes=least))
    assert Program(choices, 10**6).memory_of(found.picked) == least


def test_repair_keeps_the_other_budget():
    choices = [
        Choices("a", np.array([0.0, 0.1, 0.5]), np.array([10, 9, 9]), memory=np.array([5, 9, 4])),
        Choices("b", np.array([0.0, 0.2]), np.array([10, 9]), memory=np.array([5, 5])),
    ]
    program = Program(choices, 19, memory_bytes=10)
    # The cheapest step to 19 bytes would take 14 bytes of memory.
    assert _repaired(program, _Terms(program), [0, 0], []) == ([0, 1], [])


# -- what does not depend on the budget -----------------------------------------------------------------------------


def test_front_in_three_measures_by_hand(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        count = int(rng.integers(1, 40))
        cost, size, load = (rng.integers(0, 6, count).astype(float) for _ in range(3))
        points = np.stack([cost, size, load])
        for index in range(count):
            no_worse = (points <= points[:, [index]]).all(0)
            better = no_worse & (points < points[:, [index]]).any(0)
            twin = no_worse & ~better & (np.arange(count) < index)
            assert pareto_front(cost, size.astype(np.int64), load)[index] == (not (better | twin).any())
            more = pareto_front(cost, size.astype(np.int64), load, load[::-1])
            points_too = np.concatenate([points, load[None, ::-1]])
            below = (points_too <= points_too[:, [index]]).all(0)
            equal = (points_too == points_too[:, [index]]).all(0)
            assert more[index] == (not (below & ~equal).any() and not equal[:index].any())
        flat = pareto_front(cost, size.astype(np.int64), np.full(count, 3.0))
        assert flat.tolist() == pareto_front(cost, size.astype(np.int64)).tolist()


def tables(layers: int, candidates: int, seed: int) -> list[tuple[str, pa.Table, pa.Table]]:
    found = []
    for choices in random_choices(layers, candidates, seed):
        names = [f"Q{index}" for index in range(candidates)]
        rows = [
            {"candidate_id": name, "form": "Q", "bits": 4, "bits_a": None, "bits_b": None, "rank": None, "bytes": size}
            for name, size in zip(names, choices.size.tolist(), strict=True)
        ]
        order = np.random.default_rng(seed).permutation(candidates)  # costs come in an order of their own
        costs = pa.table({"candidate_id": [names[index] for index in order], "global_cost": choices.cost[order]})
        found.append((choices.layer, pa.Table.from_pylist(rows), costs))
    return found


def test_a_space_is_read_once_and_solved_at_many_budgets(seed):
    made = tables(6, 40, seed)
    space = SearchSpace.from_tables(made)
    smallest, largest = (sum(int(limit(layer.size)) for layer in space.choices) for limit in (np.min, np.max))
    kept = [layer.useful for layer in space.choices]
    for budget in np.linspace(smallest, largest, 20).astype(int).tolist():
        picked = solve(Program(space.choices, budget)).picked
        again = SearchSpace.from_tables(made)
        assert solve(Program(again.choices, budget)).picked == picked
        table = space.table(picked)
        assert table.schema == ALLOCATION
        assert sum(table["bytes"].to_pylist()) == Program(space.choices, budget).bytes_of(picked) <= budget
        for row, (name, candidates, costs) in zip(table.to_pylist(), made, strict=True):
            assert row["layer"] == name
            (size,) = [one["bytes"] for one in candidates.to_pylist() if one["candidate_id"] == row["candidate_id"]]
            (cost,) = [one["global_cost"] for one in costs.to_pylist() if one["candidate_id"] == row["candidate_id"]]
            assert (row["bytes"], row["global_cost"]) == (size, cost)
    assert all(layer.useful is own for layer, own in zip(space.choices, kept, strict=True)), "dominance is found once"


@pytest.mark.parametrize("objective", ["nsr", "sqnr"])
def test_exact_is_at_least_as_good_as_branch_and_bound(objective: Objective, seed: int) -> None:
    """On costs like those of layers: falling with the size, over several magnitudes."""
    rng = np.random.default_rng(seed)
    for layers in (1, 2, 12, 25):
        choices = []
        for index in range(layers):
            bits = np.sort(rng.uniform(1.5, 9.0, 30))
            cost = np.exp(rng.normal(0, 2)) * 4.0**-bits * np.exp(rng.normal(0, 0.4, 30)) * 1e-3
            choices.append(Choices(f"l{index}", cost, (bits * rng.integers(500, 50_000) / 8).astype(np.int64)))
        smallest, largest = smallest_bytes(choices), sum(int(layer.size.max()) for layer in choices)
        for tightness in (0.0, 0.1, 0.5, 1.0):
            program = Program(choices, int(smallest + tightness * (largest - smallest)), objective=objective)
            exact, bounded = solve(program, solver="exact"), solve(program, solver="highs", gap=1e-4)
            assert exact.report.name == "exact"
            assert program.bytes_of(exact.picked) <= program.budget_bytes
            best, other = worth(program, exact.picked), worth(program, bounded.picked)
            assert best <= other + 1e-9 * abs(other)
            assert other <= best + 1.1e-4 * abs(best)


def test_exact_hands_over_what_has_too_many_partial_allocations(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    choices = random_choices(5, 6, seed)
    program = Program(choices, int(1.5 * smallest_bytes(choices)))
    wanted = worth(program, solve(program).picked)
    monkeypatch.setattr("mlorq.allocation.knapsack.MOST_PARTIAL", 0)
    found = solve(program, gap=0.0)
    assert found.report.name == "highs"
    assert worth(program, found.picked) == pytest.approx(wanted, rel=1e-6)
