"""Global costs from one measurement per layer: which candidate is measured, and how good the others are."""

from __future__ import annotations

import numpy as np
import pytest

from mlorq.costs.calibrated import calibrated_cost, calibrated_sensitivity, middle_row
from mlorq.costs.measured import LayerProbe, dense_of
from tests.costs.test_measured import fitted_layer
from tests.layers import table_of


def test_the_measured_candidate_is_of_middle_size() -> None:
    size = np.array([800, 100, 200, 400, 1600, 300])
    local = np.array([0.1, 4.0, 2.0, 1.0, 0.01, 1.5])
    assert middle_row(np.arange(6), local, size) == 3  # the geometric mean of 100 and 1600
    assert middle_row(np.array([1, 2, 5]), local, size) in (2, 5)
    local[3] = 0
    assert middle_row(np.arange(6), local, size) == 5
    assert middle_row(np.array([4]), np.zeros(6), size) == 4


def test_costs_are_in_proportion() -> None:
    assert calibrated_cost(2.0, 4.0, 10.0) == pytest.approx(5.0)
    assert calibrated_cost(2.0, 0.0, 10.0) == 0.0


def test_costs_are_close_to_measured_ones(seed: int) -> None:
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    rows = {row["candidate_id"]: row for row in table.to_pylist()}
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        costs = calibrated_sensitivity(probe, fit, table).to_pylist()
        full = np.array([probe.cost(dense_of(fit, rows[row["candidate_id"]])) for row in costs])
    assert {row["candidate_id"] for row in costs} == {name for name, row in rows.items() if row["on_front"]}
    estimated = np.array([row["global_cost"] for row in costs])
    measured = np.array([row["how"] == "measured" for row in costs])
    assert measured.sum() == 1
    np.testing.assert_allclose(estimated[measured], full[measured], rtol=1e-5)
    assert np.median(np.abs(np.log(estimated / full))) < 1.0  # local costs alone are off by a factor


def test_a_cost_of_nothing_is_measured_again_at_the_largest_error(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        answers = iter([0.0, 3.0])
        monkeypatch.setattr(probe, "cost", lambda weight: next(answers))
        costs = calibrated_sensitivity(probe, fit, table).to_pylist()
        largest = max(costs, key=lambda row: row["global_cost"])
        assert largest["global_cost"] == pytest.approx(3.0)
        assert largest["how"] == "measured"
        monkeypatch.setattr(probe, "cost", lambda weight: 0.0)
        assert not any(row["global_cost"] for row in calibrated_sensitivity(probe, fit, table).to_pylist())
