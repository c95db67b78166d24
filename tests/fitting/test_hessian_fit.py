"""Closed forms of the intra-layer search against the computation they replace, on fresh random layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlorq.costs.local import spread
from mlorq.costs.pareto import pareto_front
from mlorq.fitting.hessian_fit import gram_costs
from mlorq.fitting.weighted_svd import weighted_svd
from mlorq.forms.base import Candidate
from tests.layers import dense, hessian_fit, size_of, stored, table_of

SHAPES = [(12, 40), (40, 12), (17, 17), (3, 64)]


def random_layer(rows: int, columns: int, seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return weight.to(device), torch.rand(rows, columns, generator=generator).pow(4).to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split", ["U_SV", "US_V"])
def test_weighted_svd_against_numpy(shape, split, seed, device):
    weight, hessian = random_layer(*shape, seed, device)
    factors = weighted_svd(weight, hessian, split)
    d = hessian.double().sum(1).sqrt() + 1e-8
    d = (d / d.mean()).cpu().numpy()[:, None]
    u, s, vt = np.linalg.svd(d * weight.double().cpu().numpy(), full_matrices=False)
    np.testing.assert_allclose(factors.singular_values.cpu().numpy(), s, rtol=1e-8, atol=1e-10)
    for rank in (1, 2, min(shape)):
        product = (factors.a[:, :rank] @ factors.b[:rank]).cpu().numpy()
        np.testing.assert_allclose(product, (u[:, :rank] * s[:rank]) @ vt[:rank] / d, atol=1e-9)
    size_a, size_b = factors.a.abs().max(), factors.b.abs().max()
    assert torch.isfinite(size_a)
    assert torch.isfinite(size_b)


def test_weighted_svd_of_a_layer_without_influence(seed):
    weight, _ = random_layer(6, 9, seed)
    factors = weighted_svd(weight, torch.zeros(6, 9))
    torch.testing.assert_close(factors.a @ factors.b, weight.double(), rtol=1e-9, atol=1e-9)
    assert float(factors.a.abs().max()) <= 1.0 + 1e-9  # D is balanced: no factor of 1e8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank_deficient", [False, True])
def test_gram_costs_are_those_of_the_explicit_products(shape, rank_deficient, seed, device):
    weight, hessian = random_layer(*shape, seed, device)
    if rank_deficient:
        weight[:, shape[1] // 2 :] = weight[:, :1]
    fit = hessian_fit(weight, hessian)
    costs = fit.product_costs((2, 4, 6, 8))
    assert set(costs) == {(a, b) for a in (2, 4, 6, 8) for b in (2, 4, 6, 8)}
    h = hessian.double().amax(1, keepdim=True)
    for (bits_a, bits_b), found in costs.items():
        a = fit.left_quantizer(bits_a).round_trip(fit.factors.a.float()).double()
        b = fit.right_quantizer(bits_b).round_trip(fit.factors.b.float()).double()
        expected = [
            float((h * (weight.double() - a[:, :rank] @ b[:rank]).square()).mean()) for rank in range(1, min(shape) + 1)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-22)


def test_gram_costs_keep_their_digits_where_the_product_is_nearly_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(10, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(8, 30, generator=generator, dtype=torch.float64)
    noise = 1e-4 * torch.randn(10, 30, generator=generator, dtype=torch.float64)
    weight = (a @ b + noise).float()
    found = gram_costs(weight, torch.ones(10), {8: a}, {8: b})[8, 8][-1]
    assert found == pytest.approx(float((weight.double() - a @ b).square().mean()), rel=1e-6)


@pytest.mark.parametrize("accounting", ["exact", "paper"])
def test_table_lists_every_candidate_once_with_its_cost_and_memory(accounting, seed):
    weight, hessian = random_layer(24, 60, seed)
    fit = hessian_fit(weight, hessian)
    rows = table_of(fit, bits=[2, 4, 8], factor_bits=[4, 6], accounting=accounting).to_pylist()
    assert len({row["candidate_id"] for row in rows}) == len(rows)
    largest = size_of(Candidate("Q", bits=8), 24, 60, accounting)
    for row in rows:
        candidate = Candidate.of_row(row)
        assert row["candidate_id"] == candidate.candidate_id
        assert row["bytes"] == size_of(candidate, 24, 60, accounting)
        if candidate.form == "LR":
            assert row["bytes"] < largest
            assert candidate.rank >= 2
    assert {(row["bits_a"], row["bits_b"]) for row in rows if row["form"] == "LR"} == {
        (4, 4),
        (4, 6),
        (6, 4),
        (6, 6),
    }
    for row in rows[:3]:
        error = dense(fit, Candidate.of_row(row)) - weight
        expected = float((hessian.amax(1, keepdim=True).double() * error.double().square()).mean())
        assert row["local_cost"] == pytest.approx(expected, rel=1e-9)


def test_front_is_what_no_candidate_beats(seed):
    weight, hessian = random_layer(20, 48, seed)
    rows = table_of(hessian_fit(weight, hessian)).to_pylist()
    for row in rows:
        beaten = any(
            (other["bytes"] <= row["bytes"] and other["local_cost"] < row["local_cost"])
            or (other["bytes"] < row["bytes"] and other["local_cost"] <= row["local_cost"])
            for other in rows
        )
        if row["form"] == "Q":
            assert row["on_front"]
        elif row["on_front"]:
            assert not beaten


def test_pareto_front_by_hand(seed):
    rng = np.random.default_rng(seed)
    cost, size = rng.integers(0, 12, 200).astype(float), rng.integers(0, 12, 200)
    front = pareto_front(cost, size)
    kept = {(cost[i], size[i]) for i in np.flatnonzero(front)}
    for i in range(200):
        strictly = ((cost <= cost[i]) & (size <= size[i]) & ((cost < cost[i]) | (size < size[i]))).any()
        assert ((cost[i], size[i]) in kept) == (not strictly)
    assert len(kept) == front.sum()  # of equal points one is kept


def test_grouped_layers_are_quantize_only(seed):
    weight, hessian = random_layer(8, 9, seed)
    table = table_of(hessian_fit(weight, hessian), groups=4)
    assert set(table["form"].to_pylist()) == {"Q"}


def test_rank_multiple_thins_ranks(seed):
    weight, hessian = random_layer(40, 64, seed)
    table = table_of(hessian_fit(weight, hessian), rank_multiple=8)
    ranks = {rank for rank in table["rank"].to_pylist() if rank is not None}
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


@pytest.mark.parametrize("candidate", [Candidate("Q", bits=3), Candidate("LR", bits_a=4, bits_b=6, rank=5)])
@pytest.mark.parametrize("zero_point", ["codes", "int16"])
def test_what_is_stored_is_what_was_measured(candidate, zero_point, seed):
    weight, hessian = random_layer(16, 33, seed)
    fit = hessian_fit(weight, hessian, zero_point=zero_point)
    torch.testing.assert_close(stored(fit, candidate).dense(), dense(fit, candidate), rtol=1e-6, atol=1e-7)


def test_scales_found_at_the_rank_are_no_worse(seed):
    weight, hessian = random_layer(24, 60, seed)
    fit = hessian_fit(weight, hessian)
    b = fit.factors.b[:4].float()
    a = fit.factors.a[:, :4].float()

    def error(quantizer):
        return ((quantizer.round_trip(a) @ b - weight).square() * hessian).sum(1)

    at_rank, shared = fit.left_quantizer(4, 4), fit.left_quantizer(4)
    assert (error(at_rank).sum() <= error(shared).sum() * 1.05).all()


@pytest.mark.parametrize(("count", "points"), [(1, 5), (5, 5), (6, 5), (100, 5), (3, 2), (0, 5)])
def test_spread_includes_both_ends(count, points):
    found = list(spread(count, points))
    assert found == sorted(set(found))
    assert len(found) == min(count, points)
    if count:
        assert found[0] == 0
        assert found[-1] == count - 1
