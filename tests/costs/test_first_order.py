"""First-order costs: against Jacobians, against measurements, and their corrections."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from mlorq.costs import first_order
from mlorq.costs.first_order import (
    Change,
    changes_of,
    corrected,
    fill,
    first_order_costs,
    first_order_sensitivity,
    orthonormal_vectors,
)
from mlorq.costs.measured import LayerProbe, curves, dense_of, measured_sensitivity
from mlorq.forms.base import Candidate
from mlorq.models.base import FloatModel, call_module
from mlorq.models.layer_list import LINEAR, Layer
from mlorq.models.layers import find_layers, set_matrix, weight_matrix
from tests.costs.test_measured import fitted_layer
from tests.layers import hessian_fit, table_of
from tests.nets import SharedNet, SkipNet, TokenNet, float_model, images

EXACT = 10**6  # vectors: more than there are outputs


class Convolutions(nn.Module):
    """A grouped convolution and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(6, 2, 4, stride=2, padding=1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.transposed(torch.tanh(self.grouped(x))))
        return torch.tanh(self.head(x.transpose(1, 2))).mean(1)


def tokens(samples: int, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "convolution": (TokenNet, "patch", (2, 6, 6), ()),
    "entered at a block": (TokenNet, "blocks.1.up", (2, 6, 6), ("blocks.0", "blocks.1", "blocks.2")),
    "blocks that are no chain": (SkipNet, "blocks.1.down", (2, 6, 6), ("blocks.0", "blocks.1", "blocks.2")),
    "one token": (TokenNet, "head", (2, 6, 6), ()),
    "weight of two layers": (SharedNet, "first", (3, 6), ()),
    "called twice": (SharedNet, "twice", (3, 6), ()),
    "grouped": (Convolutions, "grouped", (4, 10), ()),
    "transposed": (Convolutions, "transposed", (4, 10), ()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_costs_are_those_of_the_jacobian(case, chunk, seed, device, monkeypatch):
    """Of the whole model in float64, by central differences, exact up to the third order of a tiny step."""
    monkeypatch.setattr(first_order, "CHUNK_ELEMENTS", chunk)
    kind, name, shape, blocks = CASES[case]
    torch.manual_seed(seed)
    model = FloatModel(
        kind().double().to(device), "custom", {}, call_module, blocks=list(blocks), dtype=torch.float64, key="net"
    )
    batches = [tokens(3, seed, *shape).double(), tokens(5, seed + 1, *shape).double()]
    layers = find_layers(model, batches[0].to(device))
    layer = layers[name]
    weight = weight_matrix(model.module.get_submodule(name)).double()
    differences = [torch.randn(weight.shape, dtype=torch.float64).to(device) for _ in range(2)]
    changes = [Change(np.array([row]), value) for row, value in zip((0, 2), differences, strict=True)]
    with LayerProbe(model, layer, layers.blocks, batches, device) as probe:
        found = first_order_costs(probe, changes, 3, vectors=EXACT)
    assert found is not None
    assert found[1] == 0  # a row without a change
    module, power, step = model.module, 0.0, 1e-5
    target = module.get_submodule(name)
    expected = np.zeros(2)
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(device)
            power += float(module(moved).square().sum())
            for index, value in enumerate(differences):
                set_matrix(target, weight + step * value)
                above = module(moved)
                set_matrix(target, weight - step * value)
                expected[index] += float(((above - module(moved)) / (2 * step)).square().sum())
                set_matrix(target, weight)
    np.testing.assert_allclose(found[[0, 2]], expected / power, rtol=1e-6)


def test_all_ranks_at_once_are_those_one_by_one(seed, monkeypatch):
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    rows = table.to_pylist()
    ranked = [change for change in changes_of(fit, table) if change.a is not None]
    assert sum(len(change.rows) for change in ranked) > len(ranked) > 0
    apart = []
    for change in ranked:
        ranks = [rows[row]["rank"] for row in change.rows]
        assert ranks == sorted(ranks)
        one = Candidate.of_row(rows[change.rows[0]])
        lefts, b = fit.factors_at(ranks, one.bits_a, one.bits_b)
        for row, rank, left in zip(change.rows, ranks, lefts, strict=True):
            apart.append(Change(np.array([row]), left @ b[:rank] - fit.weight))
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        fast = first_order_costs(probe, ranked, len(rows), seed=seed)
        monkeypatch.setattr(first_order, "CHUNK_ELEMENTS", 1)
        slow = first_order_costs(probe, apart, len(rows), seed=seed)
    assert (fast > 0).sum() == len(apart)
    np.testing.assert_allclose(fast, slow, rtol=2e-3)


def test_costs_are_those_of_the_candidates_own_codes(seed, monkeypatch):
    monkeypatch.setattr(first_order, "RANKS", 1000)
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    rows = table.to_pylist()
    own = [Change(np.array([row]), dense_of(fit, rows[row]) - fit.weight) for curve in curves(table) for row in curve]
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        expected = first_order_costs(probe, own, len(rows))
        computed = first_order_costs(probe, changes_of(fit, table), len(rows))
    assert (expected > 0).sum() == table["on_front"].to_pylist().count(True)
    np.testing.assert_allclose(computed, expected, rtol=2e-3)


def test_costs_between_the_ranks_that_are_computed_are_interpolated(monkeypatch):
    monkeypatch.setattr(first_order, "RANKS", 3)
    curve = np.array([4, 2, 5, 0, 1])
    costs = np.array([0.0, 1e-4, 0.0, 7.0, 1.0, 1e-2])
    fill(costs, curve)
    np.testing.assert_allclose(costs[curve], [1, 1e-1, 1e-2, 1e-3, 1e-4])
    assert costs[3] == 7


@pytest.mark.parametrize("name", ["blocks.0.up", "blocks.2.down", "patch", "head"])
def test_small_changes_cost_what_is_measured(name, seed):
    torch.manual_seed(seed)
    model = float_model(TokenNet(), ("blocks.0", "blocks.1", "blocks.2"))
    batches = [images(4, seed), images(4, seed + 1)]
    layers = find_layers(model, batches[0])
    weight = weight_matrix(model.module.get_submodule(name))
    differences = [0.001 * torch.randn_like(weight) for _ in range(3)]
    changes = [Change(np.array([row]), value) for row, value in enumerate(differences)]
    with LayerProbe(model, layers[name], layers.blocks, batches) as probe:
        found = first_order_costs(probe, changes, 3, vectors=EXACT)
        measured = [probe.cost(weight + value) for value in differences]
    with LayerProbe(model, layers[name], layers.blocks, batches) as probe:  # with references of passes of their own
        np.testing.assert_allclose(measured, [probe.cost(weight + value) for value in differences], rtol=1e-4)
    np.testing.assert_allclose(found, measured, rtol=0.05)


@pytest.mark.parametrize(("outputs", "count"), [(1, 1), (5, 5), (5, 9), (6, 1), (7, 3)])
def test_vectors_are_orthonormal(outputs, count, seed):
    vectors = orthonormal_vectors(4, outputs, count, torch.Generator().manual_seed(seed))
    number = min(outputs, count)
    assert vectors.shape == (number, 4, outputs)
    gram = torch.einsum("isc,jsc->sij", vectors, vectors)
    torch.testing.assert_close(gram, (torch.eye(number) * outputs / number).expand(4, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("outputs", "count"), [(3, 1), (10, 2), (6, 5)])
def test_mean_and_variance_of_the_estimate(outputs, count, seed):
    samples = 20_000
    vectors = orthonormal_vectors(samples, outputs, count, torch.Generator().manual_seed(seed))
    change = torch.randn(outputs, generator=torch.Generator().manual_seed(seed))
    estimates = (vectors @ change).square().sum(0) / change.square().sum()
    variance = 2 * (outputs - count) / (count * (outputs + 2))
    assert float(estimates.mean()) == pytest.approx(1, abs=5 * (variance / samples) ** 0.5)
    assert float(estimates.var()) == pytest.approx(variance, rel=0.1)


class Measured:
    """Measured costs of candidates: the estimates times a factor of the place."""

    def __init__(self, estimates: np.ndarray, factors: np.ndarray) -> None:
        self.values, self.places = estimates * factors, []

    def __call__(self, place: int) -> float:
        self.places.append(place)
        return float(self.values[place])


def test_the_largest_error_alone_is_measured_where_the_first_order_holds(seed):
    estimates = np.sort(np.random.default_rng(seed).uniform(1e-6, 1, size=30))
    measured = Measured(estimates, np.full(30, 1.2))
    np.testing.assert_allclose(corrected(estimates, measured, 5, several=False), measured.values)
    assert measured.places == [29]


def test_a_correction_that_is_linear_in_the_logarithms_is_exact(seed):
    estimates = np.sort(np.exp(np.random.default_rng(seed).uniform(-12, 0, size=40)))
    measured = Measured(estimates, estimates**0.3)
    found = corrected(estimates, measured, 9, several=True)
    assert measured.places[:2] == [39, 20]
    assert len(measured.places) == len(set(measured.places)) <= 9
    np.testing.assert_allclose(found[20:], measured.values[20:])
    np.testing.assert_allclose(found[:20] / estimates[:20], found[20] / estimates[20])  # as at the smallest measured


@pytest.mark.parametrize(("points", "count"), list(product([1, 2, 3, 6], [1, 2, 3, 50])))
def test_no_more_is_measured_than_allowed(points, count, seed):
    rng = np.random.default_rng(seed)
    estimates = np.sort(np.exp(rng.uniform(-12, 0, size=count)))
    measured = Measured(estimates, np.exp(rng.uniform(-3, 3, size=count)))
    found = corrected(estimates, measured, points, several=True)
    assert len(measured.places) == len(set(measured.places)) <= min(points, count)
    np.testing.assert_allclose([found[place] for place in measured.places], measured.values[measured.places])


def test_neighbours_that_differ_get_a_measurement_between_them():
    estimates = np.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    measured = Measured(estimates, np.array([1, 1, 1, 1, 1, 1, 0.1]))
    found = corrected(estimates, measured, 5, several=False)
    assert measured.places == [6, 3, 4, 5]
    np.testing.assert_allclose(found, measured.values)


def test_candidates_without_an_error_cost_nothing():
    measured = Measured(np.array([0.0, 0.0, 1.0]), np.array([1, 1, 0.0]))  # and a measured cost of nothing is no error
    found = corrected(np.array([0.0, 0.0, 1.0]), measured, 5, several=True)
    assert found[:2] == [0.0, 0.0]
    assert 0 <= found[2] <= 1e-5
    assert measured.places == [2]
    assert corrected(np.zeros(3), measured, 5, several=True) == [0.0, 0.0, 0.0]
    assert measured.places == [2]


def test_costs_are_close_to_measured_ones_with_few_measurements(seed):
    model, found, layer, batches, fit = fitted_layer(seed)
    table = table_of(fit)
    rows = {row["candidate_id"]: row for row in table.to_pylist()}
    calls: list[tuple[int, int]] = []
    with LayerProbe(model, layer, found.blocks, batches) as probe:
        costs = first_order_sensitivity(probe, fit, table, progress=lambda *call: calls.append(call)).to_pylist()
        full = np.array([probe.cost(dense_of(fit, rows[row["candidate_id"]])) for row in costs])
        interpolated = measured_sensitivity(probe, fit, table)["how"].to_pylist()
    assert {row["candidate_id"] for row in costs} == {name for name, row in rows.items() if row["on_front"]}
    how = np.array([row["how"] for row in costs])
    assert set(how) == {"measured", "first_order"}
    assert len(calls) == (how == "measured").sum() < interpolated.count("measured")
    assert all(done <= most for done, most in calls)
    cost = np.array([row["global_cost"] for row in costs])
    np.testing.assert_allclose(cost[how == "measured"], full[how == "measured"], rtol=1e-5)
    assert np.median(np.abs(np.log(cost / full))) < 0.25
    assert all(row["first_order"] > 0 for row in costs)


@pytest.mark.parametrize("cost", ["kl", "task"])
def test_other_costs_are_measured(cost, seed):
    model, found, layer, batches, fit = fitted_layer(seed)
    labels = [torch.zeros(8, dtype=torch.long)] * 2
    table = table_of(fit, forms=["Q"])
    with LayerProbe(model, layer, found.blocks, batches, cost=cost, labels=labels) as probe:
        costs = first_order_sensitivity(probe, fit, table)
        assert costs.drop_columns("first_order").equals(measured_sensitivity(probe, fit, table))
    assert costs["how"].to_pylist() == ["measured"] * len(curves(table))
    assert costs["first_order"].null_count == len(costs)


class Rounding(nn.Module):
    """Outputs that are no differentiable function of the layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 8 * self.layer(x)
        return y.detach() if self.how == "detached" else y.round()


@pytest.mark.parametrize("how", ["detached", "rounded"])
def test_layers_that_no_gradient_reaches_are_measured(how, seed):
    torch.manual_seed(seed)
    model = float_model(Rounding(how))
    batches = [tokens(8, seed, 6)]
    layer = Layer("layer", LINEAR, 4, 6, groups=1, macs=24, order=0, block=0, input_group=0)  # find_layers omits it
    fit = hessian_fit(weight_matrix(model.module.layer))
    table = table_of(fit, forms=["Q"])
    with LayerProbe(model, layer, [], batches) as probe:
        costs = first_order_sensitivity(probe, fit, table)
    assert set(costs["how"].to_pylist()) == {"measured"}
    assert max(costs["global_cost"].to_pylist()) > 0
    assert costs["first_order"].null_count == len(costs)
