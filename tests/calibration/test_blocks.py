"""Second moments in blocks, against computation with the whole block-diagonal matrix on fresh random inputs."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mlorq import memory
from mlorq.calibration import blocks
from mlorq.calibration.covariance import (
    Moments,
    OuterProducts,
    in_blocks,
    inputs_tensors,
    moments_of_tensors,
    moments_tensors,
    shrink,
)
from mlorq.calibration.coverage import between_folds, damped_factor
from mlorq.calibration.in_groups import inputs_bytes
from mlorq.fitting.covariance_fit import CovarianceFit, Metric, product_costs
from mlorq.fitting.gptq import RowHessian, descend, gptq, refit_scale
from mlorq.fitting.gram import damped
from mlorq.fitting.scale_search import search_quantizer
from mlorq.fitting.trellis import TrellisFit
from mlorq.models.layer_list import Layer
from mlorq.rounding.error_feedback import balanced, corrected_weight
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments
from mlorq.rounding.ridge_rounding import round_in_halves

COUNT, WIDTH, ROWS = 3, 20, 14
SIZE = COUNT * WIDTH


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest shows it when a test fails."""
    return secrets.randbelow(2**31)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of ``SIZE`` inputs are in blocks of ``WIDTH``."""
    monkeypatch.setattr(memory, "ONE_BLOCK", SIZE - 1)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", WIDTH)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int) -> Tensor:
    """Blocks of well-conditioned second moments, of different size."""
    x = random(COUNT, 4 * WIDTH, WIDTH, seed=seed) * (1 + torch.arange(COUNT)).reshape(-1, 1, 1)
    return x.mT @ x / (4 * WIDTH)


def whole(matrix: Tensor) -> Tensor:
    return torch.block_diag(*matrix)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_the_width_of_blocks() -> None:
    assert [memory.block_width(n) for n in (1, 4096, 8192)] == [1, 4096, 8192]  # a single matrix
    assert [memory.block_width(n) for n in (12544, 11008, 14336, 16384, 36864)] == [3136, 2752, 3584, 4096, 4096]
    for n in (8193, 25088, 40000, 65537):
        width = memory.block_width(n)
        assert n % width == 0
        assert width <= memory.LARGEST_BLOCK
        assert all(n % other for other in range(width + 1, memory.LARGEST_BLOCK + 1))


def test_operations_are_those_of_the_whole_matrix(seed: int) -> None:
    m, x, y = moment(seed), random(5, SIZE, seed=seed + 1), random(5, SIZE, seed=seed + 2)
    factor, dense = torch.linalg.cholesky(m), whole(m)
    assert blocks.size(m) == SIZE
    close(blocks.diagonal(m), dense.diagonal())
    close(blocks.trace(m), dense.trace())
    close(blocks.multiply(x, m), x @ dense)
    close(whole(blocks.products(x, y, WIDTH)), (x.T @ y) * whole(torch.ones_like(m)))
    close(whole(factor), torch.linalg.cholesky(dense))
    close(blocks.solve(x, factor), x @ torch.linalg.inv(dense))
    close(blocks.solve_lower(x, factor), x @ torch.linalg.inv(torch.linalg.cholesky(dense)))
    close(whole(blocks.of_diagonal(x[0], WIDTH)), torch.diag(x[0]))
    assert torch.equal(blocks.blocks_of(dense, WIDTH), m)
    assert blocks.blocks_of(m, WIDTH) is m
    close(whole(damped(m, 0.1)), damped(dense, 0.1))
    share = WIDTH / (WIDTH + 31)
    close(whole(shrink(m, 31)), (1 - share) * dense + share * dense.diagonal().mean() * torch.eye(SIZE).double())
    assert torch.equal(whole(shrink(torch.zeros_like(m), 9)), torch.eye(SIZE).double())
    for index, (part, block) in enumerate(blocks.parts(m)):
        assert (part.start, part.stop) == (index * WIDTH, (index + 1) * WIDTH)
        assert torch.equal(block, m[index])


def test_a_single_matrix_is_computed_with_as_before(seed: int) -> None:
    """To the last bit: widths that had one matrix keep their numbers."""
    x, y = random(7, SIZE, seed=seed), random(7, SIZE, seed=seed + 1)
    m = x.T @ x + torch.eye(SIZE)
    factor = torch.linalg.cholesky(m)
    assert torch.equal(blocks.multiply(y, m), y @ m)
    assert torch.equal(blocks.products(x, y, SIZE), x.T @ y)
    assert torch.equal(blocks.solve(y, factor), torch.cholesky_solve(y.T, factor).T)
    assert torch.equal(blocks.solve_lower(y, factor), torch.linalg.solve_triangular(factor, y, upper=False, left=False))
    assert torch.equal(blocks.of_diagonal(x[0], SIZE), torch.diag(x[0]))
    assert torch.equal(blocks.trace(m), m.trace())


@pytest.mark.usefixtures("narrow")
def test_sums_of_products_and_what_is_stored(seed: int) -> None:
    """Blocks of the sums of all products, with masks and weights; a file with the whole matrix is read as blocks."""
    vectors = random(6, 4, SIZE, seed=seed).float()
    mask, weights = random(6, 4, seed=seed + 1) > -1, random(6, 4, seed=seed + 2).float().exp()
    found, dense = OuterProducts(SIZE, "cpu", memory.block_width(SIZE)), OuterProducts(SIZE, "cpu")
    for sums in (found, dense):
        sums.add(vectors, 0, mask)
        sums.add(vectors, 6, None, weights)
    assert found.sums.shape == (2, COUNT, WIDTH, WIDTH)
    assert found.counts == dense.counts
    own = {"gradients": torch.eye(3).expand(2, 3, 3), "gradient_tokens": torch.tensor([5, 5])}
    read = [moments_of_tensors(moments_tensors(own, inputs_tensors(sums)), "cpu") for sums in (found, dense)]
    for fold, other in zip(*read, strict=True):
        torch.testing.assert_close(fold.inputs, other.inputs, rtol=1e-5, atol=1e-5)
        assert fold.inputs.shape == (COUNT, WIDTH, WIDTH)
    layer = Layer("wide", "linear", 8, SIZE, 1, 1, 0, 0, 0)
    assert in_blocks(layer)
    assert not in_blocks(replace(layer, in_features=SIZE - 1))
    assert inputs_bytes(layer)[0] == found.sums.nbytes


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_is_that_under_the_whole_matrix(seed: int, bits: int) -> None:
    weight, m = random(ROWS, SIZE, seed=seed).float(), moment(seed + 1)
    own, dense = RowHessian(m), RowHessian(whole(m))
    quantizer = search_quantizer(weight, bits, [0.99, 1.0], weights=blocks.diagonal(m).float().expand_as(weight))
    close(own.norms(weight), dense.norms(weight))
    nearest = quantizer.quantize(weight)
    for rounded in (lambda h: gptq(weight, h, quantizer), lambda h: descend(weight, h, quantizer, nearest, sweeps=3)):
        codes, expected = rounded(own), rounded(dense)
        assert (codes != expected).float().mean() < 0.005  # ties
        errors = [refit_scale(weight, dense, quantizer, each)[1].sum() for each in (codes, expected)]
        torch.testing.assert_close(*errors, rtol=1e-2, atol=0.0)
        ours, theirs = (refit_scale(weight, h, quantizer, codes) for h in (own, dense))
        assert torch.equal(ours[0].scale, theirs[0].scale)
        close(ours[1], theirs[1])


def fits(seed: int) -> tuple[CovarianceFit, CovarianceFit]:
    """A layer under blocks, and under the whole matrix."""
    weight, g = random(ROWS, SIZE, seed=seed).float(), random(40, ROWS, seed=seed + 1)
    gradients = shrink(g.T @ g / 40, 40)
    m, judge = moment(seed + 2), moment(seed + 3)

    def fit(of: Callable[[Tensor], Tensor]) -> CovarianceFit:
        return CovarianceFit(
            weight, Metric(of(m), gradients), [0.99, 1.0], rotation=None, judge=Metric(of(judge), gradients)
        )

    return fit(lambda matrix: matrix), fit(whole)


def test_fits_are_those_under_the_whole_matrix(seed: int) -> None:
    own, dense = fits(seed)
    close(own.factors.singular_values, dense.factors.singular_values)
    close(own.factors.a @ own.factors.b, dense.factors.a @ dense.factors.b)
    left, right = {4: own.factors.a.float()}, {4: own.factors.b.float()}
    for found, expected in zip(
        *(product_costs(own.weight, fit.judge, left, right).values() for fit in (own, dense)), strict=True
    ):
        close(found, expected)
    costs = [torch.tensor(fit.cost(torch.zeros_like(fit.weight))) for fit in (own, dense)]
    close(*costs)
    for made in (
        lambda fit: fit.codes(3).dequantize(),
        lambda fit: fit.trellis([2])[0].dequantize(),
        lambda fit: torch.linalg.multi_dot([part.dequantize() for part in fit.product(5, 4, 4).values()]),
    ):
        errors = [dense.metric.cost(made(fit).double() - fit.weight) for fit in (own, dense)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
    for found, expected in zip(*(fit.trellis_costs([2, 3]) for fit in (own, dense)), strict=True):
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.usefixtures("narrow")
def test_rotated_trellis_codes_are_found_and_judged_in_blocks(seed: int) -> None:
    weight, m, g = random(24, SIZE, seed=seed), moment(seed + 1), torch.eye(24).double()
    fit = TrellisFit(m, g, 7)
    codes = fit.codes(weight, 3)
    assert int(codes.rotation) == -2 - 7
    error = codes.dequantize().double() - weight
    by_columns = fit.target(codes.dequantize()) - fit.target(weight)
    torch.testing.assert_close(
        (blocks.multiply(by_columns, fit.hessian.matrix) * by_columns).sum(),
        (blocks.multiply(error, m) * error).sum(),
        rtol=1e-4,
        atol=0.0,
    )
    assert (blocks.multiply(error, m) * error).sum() < 0.05 * (blocks.multiply(weight, m) * weight).sum()


def paired(seed: int, width: int) -> InputMoments:
    """Moments of correlated inputs and their drift, in two folds, with blocks of a width."""
    x = random(400, SIZE, seed=seed) @ random(SIZE, SIZE, seed=seed + 1) + random(SIZE, seed=seed + 2)
    y = x + 0.3 * random(400, SIZE, seed=seed + 3) + 0.1 * x.roll(1, dims=1)

    def made(x: Tensor, y: Tensor, folds: tuple[InputMoments, ...] = ()) -> InputMoments:
        d, n = x - y, len(x)
        sums = [blocks.products(one, other, width) / n for one, other in ((y, y), (d, y), (d, d))]
        return InputMoments(*sums, n, y.mean(0), d.mean(0), folds)

    return made(x, y, (made(x[::2], y[::2]), made(x[1::2], y[1::2])))


def as_whole(moments: InputMoments) -> InputMoments:
    fields = {name: whole(getattr(moments, name)) for name in ("compressed", "drift_cross", "drift")}
    return replace(moments, **fields, folds=tuple(as_whole(fold) for fold in moments.folds))


@pytest.mark.parametrize("centred", [False, True])
def test_error_feedback_is_that_under_the_whole_matrix(seed: int, centred: bool) -> None:
    weight = random(ROWS, SIZE, seed=seed + 9).float()
    own = paired(seed, WIDTH)
    dense = as_whole(own)
    if centred:
        own = own.centred()
        every = paired(seed, SIZE).centred()
        mask = whole(torch.ones_like(own.compressed))
        close(whole(own.drift_cross), every.drift_cross * mask)
        dense = as_whole(own)
    corrected = corrected_weight(weight, own)
    close(corrected, corrected_weight(weight, dense))
    assert not torch.equal(corrected, weight.double())
    balance = balanced(own, weight) - shrink(own.compressed, own.tokens)
    assert not (balance - blocks.of_diagonal(blocks.diagonal(balance), WIDTH)).any()
    gained = blocks.diagonal(shrink(own.compressed, own.tokens) - own.compressed).clamp(min=0)
    power = weight.double().square().sum(0)
    most = (power * blocks.diagonal(own.compressed)).mean() / power
    close(gained + blocks.diagonal(balance), torch.minimum(gained, most))
    rounded = weight + 0.1
    assert output_error(weight, rounded, own) == pytest.approx(output_error(weight, rounded, dense), rel=1e-9)


def test_halves_are_those_of_each_block(seed: int) -> None:
    weight, m = random(ROWS, SIZE, seed=seed).float(), moment(seed + 1)
    quantizer = search_quantizer(weight, 3, [1.0])
    found = round_in_halves(weight, m, quantizer)
    for part, block in blocks.parts(m):
        assert torch.equal(found[:, part], round_in_halves(weight[:, part], block, quantizer))


def test_coverage_is_that_under_the_whole_matrix(seed: int) -> None:
    folds = [Moments(moment(seed + index), torch.eye(1).double(), 30, 30) for index in range(2)]
    dense = [replace(fold, inputs=whole(fold.inputs)) for fold in folds]
    found, expected = (between_folds("a", each, damped_factor(each[0].inputs)) for each in (folds, dense))
    assert (found.width, found.tokens) == (expected.width, expected.tokens) == (SIZE, 30)
    assert found.rank == pytest.approx(expected.rank, rel=1e-9)
    assert found.ratio == pytest.approx(expected.ratio, rel=1e-9)
