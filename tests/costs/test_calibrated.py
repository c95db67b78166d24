"""Costs from closed forms: how many measurements they take, and how far they are from measured ones."""

from __future__ import annotations

import numpy as np
import pytest

from mlorq.costs.calibrated import measure_where_needed, scaled_closed_form, scaled_sensitivity
from mlorq.costs.measured import LayerProbe, dense_of
from tests.costs.test_measured import fitted_layer
from tests.layers import table_of


def front(seed: int, points: int = 40) -> np.ndarray:
    return np.sort(np.exp(np.random.default_rng(seed).uniform(-12, 0, points)))[::-1]


def test_costs_in_proportion_take_three_measurements(seed):
    local = front(seed)
    asked: list[int] = []

    def measure(index: int) -> float:
        asked.append(index)
        return 30.0 * local[index]

    found = measure_where_needed(local, measure, 10, 0.2)
    assert len(asked) == len(set(asked)) == 3
    assert {0, len(local) - 1} < set(found)
    known = np.array(sorted(found))
    costs = scaled_closed_form(local, known, np.array([found[index] for index in sorted(found)]))
    np.testing.assert_allclose(costs, 30 * local, rtol=1e-9)


def test_a_factor_that_changes_is_measured_where_it_does(seed):
    local = front(seed, 80)
    logs = np.log(local)
    low, high = logs.min(), logs.max()
    truth = np.exp(logs + np.where(logs > low + 0.6 * (high - low), 0.0, 1.5))  # a step between two levels
    few = measure_where_needed(local, lambda index: truth[index], 5, 0.2)
    many = measure_where_needed(local, lambda index: truth[index], 20, 0.2)
    assert len(few) == 5
    assert 5 < len(many) < 20  # it stops by itself

    def error(found: dict[int, float]) -> float:
        known = np.array(sorted(found))
        costs = scaled_closed_form(local, known, np.array([found[index] for index in known.tolist()]))
        return float(np.abs(np.log(costs / truth)).mean())

    assert error(many) < error(few)


@pytest.mark.parametrize("points", [1, 2, 3])
def test_short_fronts_are_measured_whole(points):
    local = np.array([1.0, 0.1, 0.01])[:points]
    assert set(measure_where_needed(local, lambda index: local[index], 9, 0.2)) == set(range(points))


def test_points_without_a_cost_do_no_harm():
    local = np.array([1.0, 0.5, 0.1, 0.0])
    found = measure_where_needed(local, lambda index: [1.0, 0.5, 0.0, 0.0][index], 4, 0.2)
    known = np.array(sorted(found))
    costs = scaled_closed_form(local, known, np.array([found[index] for index in known.tolist()]))
    assert np.isfinite(costs).all()
    assert (costs >= 0).all()


def test_scaled_costs_are_close_to_measured_ones_and_progress_ends(seed):
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    seen: list[tuple[int, int]] = []
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        costs = scaled_sensitivity(
            probe, fit, table, points=5, tolerance=0.2, progress=lambda *step: seen.append(step)
        ).to_pylist()
        rows = {row["candidate_id"]: row for row in table.to_pylist()}
        full = np.array([probe.cost(dense_of(fit, rows[row["candidate_id"]])) for row in costs])
    assert {row["candidate_id"] for row in costs} == {name for name, row in rows.items() if row["on_front"]}
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    estimated = np.array([row["global_cost"] for row in costs])
    measured = np.array([row["how"] == "measured" for row in costs])
    assert 4 <= measured.sum() <= 10
    np.testing.assert_allclose(estimated[measured], full[measured], rtol=1e-5)
    assert np.median(np.abs(np.log(estimated / full))) < 0.7  # local costs alone are off by a factor


def test_costs_that_are_nothing_do_not_drag_others_down(seed, monkeypatch):
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        plain = scaled_sensitivity(probe, fit, table, points=3).to_pylist()
        measure, smallest = probe.cost, min(row["global_cost"] for row in plain)
        # As a task's loss that falls for the smallest changes.
        monkeypatch.setattr(probe, "cost", lambda weight: 0.0 if (cost := measure(weight)) < 2 * smallest else cost)
        found_costs = scaled_sensitivity(probe, fit, table, points=3).to_pylist()
        monkeypatch.setattr(probe, "cost", lambda weight: 0.0)
        nothing = scaled_sensitivity(probe, fit, table, points=3).to_pylist()
    assert sum(row["global_cost"] == 0 for row in found_costs) == 1
    costs = [row["global_cost"] for row in found_costs if row["how"] == "closed_form"]
    assert min(costs) > 1e-3 * smallest
    assert not any(row["global_cost"] for row in nothing)
