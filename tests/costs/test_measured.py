"""Measured and interpolated global costs."""

from __future__ import annotations

import numpy as np
import pytest

import mlorq
from mlorq.allocation.choices import choices_from_tables
from mlorq.artifacts.store import Store
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.costs.measured import LayerProbe, dense_of, interpolate, measured_sensitivity, spread_batches
from mlorq.models.layers import find_layers, weight_matrix
from tests.layers import hessian_fit, table_of
from tests.nets import TokenNet, float_model, images

import torch  # isort: skip


def fitted_layer(seed: int, name: str = "blocks.1.down"):
    torch.manual_seed(seed)
    module = TokenNet(width=32)
    with torch.no_grad():  # a falling spectrum, as trained layers have: low-rank candidates reach the front
        for block in module.blocks:
            u, s, v = torch.linalg.svd(block.down.weight, full_matrices=False)
            block.down.weight.copy_(u * (2 * s.max() * 0.8 ** torch.arange(len(s))) @ v)
    model = float_model(module, ("blocks.0", "blocks.1", "blocks.2"))
    batches = [images(8, seed), images(8, seed + 1)]
    found = find_layers(model, batches[0])
    layer = found[name]
    hessian = label_free_hessian(model, [layer], batches)[name]
    weight = weight_matrix(model.module.get_submodule(name))
    return model, found, layer, batches, hessian_fit(weight, hessian)


def test_every_front_candidate_gets_a_cost_and_few_are_measured(seed):
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        costs = measured_sensitivity(probe, fit, table, points=3).to_pylist()
    front = {row["candidate_id"] for row in table.to_pylist() if row["on_front"]}
    assert {row["candidate_id"] for row in costs} == front
    by_id = {row["candidate_id"]: row for row in costs}
    assert all(by_id[f"Q{bits}"]["how"] == "measured" for bits in (2, 3, 4, 6, 8))
    measured = [row for row in costs if row["how"] == "measured"]
    assert len(measured) <= 5 + 9 * 3
    assert any(row["how"] == "interpolated" for row in costs)


def test_interpolated_costs_are_close_to_measured_ones(seed):
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        some = measured_sensitivity(probe, fit, table, points=5).to_pylist()
        rows = {row["candidate_id"]: row for row in table.to_pylist()}
        full = np.array([probe.cost(dense_of(fit, rows[row["candidate_id"]])) for row in some])
    found_costs = np.array([row["global_cost"] for row in some])
    interpolated = np.array([row["how"] == "interpolated" for row in some])
    assert interpolated.any()
    np.testing.assert_allclose(found_costs[~interpolated], full[~interpolated], rtol=1e-5)
    error = np.abs(np.log(found_costs[interpolated] / full[interpolated]))
    assert np.median(error) < 0.35
    assert np.corrcoef(np.log(found_costs), np.log(full))[0, 1] > 0.95


def test_every_form_on_the_front_is_measured_on_every_curve_and_reaches_the_program(seed):
    model, found, layer, batches, fit = fitted_layer(seed, "blocks.1.up")
    table = table_of(fit, forms=["Q", "LR", "QLR"], sum_ranks=[2, 3, 4, 6, 8, 12, 16])
    rows = {row["candidate_id"]: row for row in table.to_pylist()}
    front = {name for name, row in rows.items() if row["on_front"]}
    assert {rows[name]["form"] for name in front} == {"Q", "LR", "QLR"}
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        costs = measured_sensitivity(probe, fit, table, points=2)
        full = {name: probe.cost(dense_of(fit, rows[name])) for name in front}
    by_id = {row["candidate_id"]: row for row in costs.to_pylist()}
    assert set(by_id) == front
    curves: dict[tuple[object, ...], list[str]] = {}
    for name in front:
        row = rows[name]
        curves.setdefault((row["form"], row["bits"], row["bits_a"], row["bits_b"]), []).append(name)
    for names in curves.values():
        ends = (
            min(names, key=lambda name: rows[name]["rank"] or 0),
            max(names, key=lambda name: rows[name]["rank"] or 0),
        )
        measured = {name for name in names if by_id[name]["how"] == "measured"}
        assert measured == set(ends)
        for name in ends:
            assert by_id[name]["global_cost"] == pytest.approx(full[name], rel=1e-5)
    _, kept = choices_from_tables(layer.name, table, costs)
    assert {row["form"] for row in kept} == {"Q", "LR", "QLR"}
    assert len(kept) == len(front)


@pytest.mark.parametrize("how", ["measured", "first_order", "closed_form"])
def test_a_run_measures_the_forms_that_are_on_its_fronts(how, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.ReLU(), torch.nn.Linear(48, 48))
    data = list(torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).split(16))
    search = {"forms": ["Q", "QLR"], "sensitivity": how, "samples": 8, "hessian_samples": 8}
    options = {"preset": "quick", "rounding": "nearest", "device": "cpu", "store": f"file://{tmp_path}"}
    mlorq.compress(module, data, budget="3bit", search=search, **options)
    store = Store(f"file://{tmp_path}")
    on_fronts: dict[str, str] = {}
    for ref in store.refs("candidates"):
        for row in store.read_table(ref, "candidates.parquet").to_pylist():
            if row["on_front"]:
                on_fronts[row["candidate_id"]] = row["form"]
    measured = [
        on_fronts[row["candidate_id"]]
        for ref in store.refs("sensitivity")
        for row in store.read_table(ref, "sensitivity.parquet").to_pylist()
        if row["how"] == "measured"
    ]
    assert set(on_fronts.values()) == {"Q", "QLR"}
    if how == "measured":
        assert set(measured) == {"Q", "QLR"}
    elif how == "first_order":
        assert set(measured) == {"Q", "QLR"}
        assert len(measured) < len(on_fronts)
    else:
        assert len(measured) == 2  # one per layer


def test_interpolation_is_linear_in_local_cost(seed):
    rng = np.random.default_rng(seed)
    local = np.sort(rng.uniform(size=11))[::-1]
    measured = np.array([0, 3, 10])
    values = rng.uniform(size=3)
    found = interpolate(local, measured, values)
    expected = np.interp(local, local[measured][::-1], values[::-1])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_neighbours_of_equal_local_cost_give_their_mean():
    found = interpolate(np.array([1.0, 1.0, 1.0]), np.array([0, 2]), np.array([2.0, 4.0]))
    assert found.tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(("samples", "expected"), [(4, [2]), (8, [1, 4]), (20, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_batches_are_spread_over_the_list(samples, expected):
    batches = [torch.full((4, 1), float(index)) for index in range(5)]
    found = [int(batch[0, 0]) for batch in spread_batches(batches, samples)]
    assert found == expected or (samples == 8 and found == [1, 3])
