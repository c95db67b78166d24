"""Closed forms against naive computation: GPTQ, coordinate descent, two-sided SVD, costs of all ranks, moments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mlorq.calibration.covariance import LEAST_SHRINKAGE, Moments, OuterProducts, pooled, shrink
from mlorq.codecs.affine import RowQuantizer
from mlorq.fitting.covariance_fit import CovarianceFit, Metric, covariance_fit, product_costs
from mlorq.fitting.gptq import DAMPING, RowHessian, descend, gptq, refit_scale
from mlorq.fitting.gram import damped
from mlorq.fitting.scale_search import search_quantizer
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import FORMS, Candidate
from tests.layers import dense, table_of

PERCENTILES = (0.95, 0.99, 1.0)


def covariance(size: int, seed: int, samples: int = 400) -> Tensor:
    """Of correlated inputs with directions of very different variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.logspace(0, -1.5, size)
    x = (torch.randn(samples, size, generator=generator) @ mixing).double()
    return shrink(x.T @ x / samples, samples)


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1000))


def row_errors(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """``(ŵ - w) H (ŵ - w)ᵀ`` of every row."""
    error = rounded.double() - weight.double()
    return torch.einsum("ri,ij,rj->r", error, hessian.double(), error)


# -- GPTQ -------------------------------------------------------------------------------------------------------------


def naive_gptq(weight: Tensor, hessian: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Column by column, the inverse of what is left of H computed anew each time (OBQ with a fixed order)."""
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    h = hessian.double() + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    left, codes = weight.double().clone(), torch.empty_like(weight)
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        code = (left[:, column] / quantizer.scale).round() + quantizer.zero_point
        code = code.clamp(0, 2**quantizer.bits - 1)
        codes[:, column] = code.float()
        error = (left[:, column] - (code - quantizer.zero_point) * quantizer.scale) / inverse[0, 0]
        left[:, rest] -= torch.outer(error, inverse[0])
    return codes


@pytest.mark.parametrize("columns", [7, 70])  # within one block of columns, and beyond it
def test_gptq_is_the_naive_column_by_column_rounding(columns: int, seed: int) -> None:
    weight, hessian = weights(5, columns, seed), covariance(columns, seed)
    quantizer = search_quantizer(weight, 3, PERCENTILES)
    found, expected = gptq(weight, RowHessian(hessian), quantizer), naive_gptq(weight, hessian, quantizer)
    # Float32 against float64: a tie may fall the other way now and then, and moves what comes after.
    errors = [row_errors(weight, quantizer.dequantize(codes), hessian) for codes in (found, expected)]
    assert (found != expected).double().mean() < 0.05
    torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=0.02, atol=0)


def test_gptq_is_better_than_nearest_and_descent_never_worse(seed: int) -> None:
    weight, hessian = weights(12, 80, seed), covariance(80, seed)
    quantizer = search_quantizer(weight, 3, PERCENTILES)

    def error(codes: Tensor, used: RowQuantizer = quantizer) -> Tensor:
        return row_errors(weight, used.dequantize(codes), hessian)

    nearest, rounded = quantizer.quantize(weight), gptq(weight, RowHessian(hessian), quantizer)
    assert error(rounded).sum() < 0.8 * error(nearest).sum()
    for start in (nearest, rounded):
        better = descend(weight, RowHessian(hessian), quantizer, start, sweeps=3)
        assert (error(better) <= error(start) * (1 + 1e-4)).all()
        refitted, errors = refit_scale(weight, RowHessian(hessian), quantizer, better)
        torch.testing.assert_close(errors, error(better, refitted), rtol=1e-4, atol=1e-9)
        assert (error(better, refitted) <= error(better) * (1 + 1e-5)).all()
        assert torch.equal(refitted.scale, refitted.scale.half().float())


def test_descent_ends_where_no_single_code_can_be_improved(seed: int) -> None:
    weight, hessian = weights(3, 6, seed), covariance(6, seed)
    quantizer = search_quantizer(weight, 2, PERCENTILES)
    codes = descend(weight, RowHessian(hessian), quantizer, quantizer.quantize(weight), sweeps=50)
    least = row_errors(weight, quantizer.dequantize(codes), hessian)
    for column, code in itertools.product(range(6), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert (row_errors(weight, quantizer.dequantize(other), hessian) >= least * (1 - 1e-4)).all()


def test_a_hessian_with_dead_inputs_is_no_obstacle() -> None:
    hessian = torch.zeros(6, 6, dtype=torch.float64)
    hessian[0, 0] = 4.0
    weight = weights(3, 6, 0)
    quantizer = search_quantizer(weight, 4, PERCENTILES)
    for matrix in (hessian, torch.zeros_like(hessian)):
        assert torch.isfinite(gptq(weight, RowHessian(matrix), quantizer)).all()
        refitted, errors = refit_scale(weight, RowHessian(matrix), quantizer, quantizer.quantize(weight))
        assert torch.isfinite(errors).all()
        assert (refitted.scale > 0).all()


# -- two-sided SVD ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_two_sided_factors_are_the_best_of_their_rank(shape: tuple[int, int], seed: int) -> None:
    rows, columns = shape
    weight, metric = weights(rows, columns, seed), Metric(covariance(columns, seed), covariance(rows, seed + 1))
    factors = metric.svd(weight)
    torch.testing.assert_close(factors.a @ factors.b, weight.double(), rtol=1e-6, atol=1e-8)
    squares = factors.singular_values.square()
    for rank in (1, 4, 8):
        product = factors.a[:, :rank] @ factors.b[:rank]
        expected = float(squares[rank:].sum())  # Eckart and Young
        assert metric.cost(weight - product) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    gram = factors.a.T @ metric.gradients @ factors.a
    off_diagonal = gram - torch.diag(gram.diagonal())
    assert off_diagonal.abs().max() < 1e-6 * gram.diagonal().max()


def test_cost_is_the_error_over_tokens_and_gradients(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 7, generator=generator).double()
    g = torch.randn(50, 5, generator=generator).double()
    difference = torch.randn(5, 7, generator=generator).double()
    metric = Metric(x.T @ x / 60, g.T @ g / 50)
    naive = float((g @ difference @ x.T).square().mean()) / float((g.T @ g / 50).diagonal().mean())
    assert metric.cost(difference) == pytest.approx(naive, rel=1e-9)


def test_costs_of_all_ranks_are_those_of_every_product(seed: int) -> None:
    weight, metric = weights(9, 12, seed), Metric(covariance(12, seed), covariance(9, seed + 1))
    closed = CovarianceFit(weight, metric, PERCENTILES)
    left = {bits: closed.left_at_all_ranks(bits, 9) for bits in (4, 6)}
    right = {bits: closed.right(bits, 9).dequantize() for bits in (4, 8)}
    for (bits_a, bits_b), costs in product_costs(closed.weight, metric, left, right).items():
        for rank in range(1, 10):
            product = left[bits_a][:, :rank].double() @ right[bits_b][:rank].double()
            assert float(costs[rank - 1]) == pytest.approx(metric.cost(weight - product), rel=1e-6)


# -- candidates -------------------------------------------------------------------------------------------------------


def test_forms_in_closed_form_beat_what_they_start_from(seed: int) -> None:
    weight, metric = weights(24, 40, seed), Metric(covariance(40, seed), covariance(24, seed + 1))
    closed = CovarianceFit(weight, metric, PERCENTILES)

    def cost(candidate: Candidate) -> float:
        return metric.cost(dense(closed, candidate) - weight)

    nearest = search_quantizer(weight, 3, PERCENTILES).round_trip(weight)
    assert cost(Candidate("Q", bits=3)) < 0.8 * metric.cost(nearest - weight)
    quantized = cost(Candidate("Q", bits=2))
    sums = [cost(Candidate("QLR", bits=2, bits_a=4, bits_b=4, rank=rank)) for rank in (2, 8)]
    assert sums[1] < sums[0] < quantized
    low_rank = [cost(Candidate("LR", bits_a=8, bits_b=8, rank=rank)) for rank in (4, 12, 24)]
    assert low_rank[2] < low_rank[1] < low_rank[0]


def test_latent_values_round_to_their_codes(seed: int) -> None:
    weight, metric = weights(8, 20, seed), Metric(covariance(20, seed))
    candidate = Candidate("QLR", bits=2, bits_a=4, bits_b=4, rank=3)
    for part in FORMS[candidate.form].fit(CovarianceFit(weight, metric, PERCENTILES), candidate).values():
        assert torch.equal(part.quantizer.quantize(part.latent()), part.codes)
        error = (part.latent() - part.values).abs().mean()
        assert error <= (part.dequantize() - part.values).abs().mean()


def folds_of(x: Tensor, g: Tensor) -> list[Moments]:
    found = []
    for fold in range(2):
        inputs, gradients = x[fold::2].double(), g[fold::2].double()
        tokens, count = len(inputs), len(gradients)
        found.append(Moments(inputs.T @ inputs / tokens, gradients.T @ gradients / count, tokens, count))
    return found


def test_a_rank_that_only_the_fitted_samples_allow_is_not_free(seed: int) -> None:
    """Few tokens span few directions: judged on themselves a low rank costs nothing, on others it does."""
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(16, 40, generator=generator), torch.randn(300, 12, generator=generator)
    settings, folds = FitSettings(metric="moments"), folds_of(x, g)
    fits = [covariance_fit(weights(12, 40, seed), used, settings) for used in (folds, folds[:1])]
    held_out, fitted = (fit.product_costs([8])[8, 8] for fit in fits)
    assert fitted[9] < 0.2 * fitted[1]
    assert held_out[9] > 2 * fitted[9]


def test_table_of_all_three_forms(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 30, generator=generator) * torch.logspace(0, -2, 30)
    folds = folds_of(x, torch.randn(300, 20, generator=generator))
    fit = covariance_fit(weights(20, 30, seed), folds, FitSettings(metric="moments"))
    rows = table_of(fit, forms=["Q", "LR", "QLR"], sum_ranks=[2, 4, 64]).to_pylist()
    assert {row["form"] for row in rows} == {"Q", "LR", "QLR"}
    assert max(row["rank"] for row in rows if row["form"] == "QLR") == 4  # no rank beyond the matrix
    for row in rows:
        if row["form"] == "Q":
            error = dense(fit, Candidate("Q", bits=row["bits"])) - fit.weight
            assert row["local_cost"] == pytest.approx(fit.judge.cost(error) / error.numel(), rel=1e-6)


# -- moments ----------------------------------------------------------------------------------------------------------


def test_outer_products_in_a_stream_are_those_of_all_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(7, 5, 4, generator=generator)
    mask = torch.rand(7, 5, generator=generator) < 0.7
    products = OuterProducts(4, "cpu")
    for start, stop in ((0, 3), (3, 4), (4, 7)):  # folds go by the running index
        products.add(tokens[start:stop], start, mask[start:stop])
    for fold in range(2):
        rows = tokens[fold::2][mask[fold::2]].double()
        assert products.counts[fold] == len(rows)
        torch.testing.assert_close(products.means()[fold], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_pooling_weighs_by_tokens_and_shrinking_keeps_the_trace(seed: int) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)).double()
    one = Moments(x[:10].T @ x[:10] / 10, torch.eye(3).double(), 10, 1)
    two = Moments(x[10:].T @ x[10:] / 20, torch.eye(3).double(), 20, 1)
    torch.testing.assert_close(pooled([one, two]).inputs, x.T @ x / 30)
    shrunk = shrink(one.inputs, 10)
    assert float(shrunk.trace()) == pytest.approx(float(one.inputs.trace()))
    torch.testing.assert_close(
        shrunk - (10 / 14) * one.inputs, (4 / 14) * one.inputs.trace() / 4 * torch.eye(4).double()
    )
    assert torch.linalg.eigvalsh(shrink(torch.ones(4, 4), 10**9)).min() > 0.5 * LEAST_SHRINKAGE
    assert torch.equal(shrink(torch.zeros(3, 3), 5), torch.eye(3).double())


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e-20, 2.6e-23, 0.0])
def test_moments_of_vanishing_vectors_have_factors(size: float) -> None:
    """Of numbers of 2.6e-23 the products are at float32's smallest number: rounded, they are not positive definite."""
    generator = torch.Generator().manual_seed(0)
    common, scales = torch.randn(4, 250, 1, generator=generator), torch.linspace(0.7, 1.5, 16)
    products = OuterProducts(16, "cpu")
    products.add(size * common * scales, 0)
    for matrix in products.means(torch.float32):
        factor = torch.linalg.cholesky(shrink(matrix, 500))
        assert factor.isfinite().all()


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 3), torch.full((3, 3), 1e-310), torch.ones(3, 3), torch.eye(3) * 1e9]
)
def test_damped_matrices_have_cholesky_factors(matrix: Tensor) -> None:
    found = damped(matrix.double(), 1e-2)
    assert torch.linalg.cholesky(found).isfinite().all()
    level = float(matrix.double().diagonal().mean())
    shift = 1e-2 * level if level > 1e-300 else 1.0
    torch.testing.assert_close(found, matrix.double() + shift * torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_factors_of_a_zero_weight_are_finite_and_zero() -> None:
    found = Metric(covariance(6, 0), covariance(4, 1)).svd(torch.zeros(4, 6))
    assert found.a.isfinite().all()
    assert found.b.isfinite().all()
    assert not (found.a @ found.b).any()
