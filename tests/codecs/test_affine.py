"""Quantizers against their definition, and the range search against trying every range by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlorq.fitting.scale_search import range_quantizer, row_ranges, search_left_factor, search_quantizer

PERCENTILES = [0.9, 0.97, 0.99, 0.999, 1.0]


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def naive_row(row: np.ndarray, low: float, high: float, bits: int, contains_zero: bool) -> np.ndarray:
    """One row through the textbook quantizer, value by value."""
    if contains_zero or high <= low:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float16(max((high - low) / (2**bits - 1), 2.0**-24)))
    if low == high == 0:
        scale = 1.0
    zero = round(-low / scale)
    if contains_zero:
        zero = min(max(zero, 0), 2**bits - 1)
    return np.array([(min(max(round(w / scale) + zero, 0), 2**bits - 1) - zero) * scale for w in row])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("zero_point", ["codes", "int16"])
def test_search_finds_the_best_of_all_ranges(bits, zero_point, seed, device):
    values = random_matrix(7, 33, seed)
    weights = torch.rand(7, 33, generator=torch.Generator().manual_seed(seed + 1))
    found = search_quantizer(values.to(device), bits, PERCENTILES, weights=weights.to(device), zero_point=zero_point)
    errors = (found.round_trip(values.to(device)).cpu() - values).square().mul(weights).sum(1)
    for row in range(7):
        best = np.inf
        for p in PERCENTILES:
            low, high = (float(np.quantile(values[row].numpy(), q)) for q in (1 - p, p))
            rounded = naive_row(values[row].double().numpy(), low, high, bits, zero_point == "codes")
            best = min(
                best,
                float((weights[row].double().numpy() * (rounded - values[row].double().numpy()) ** 2).sum()),
            )
        assert errors[row] <= best * 1.01 + 1e-9


def test_left_factor_is_judged_after_multiplication(seed, device):
    a, b = random_matrix(9, 5, seed), random_matrix(5, 21, seed + 1)
    target, weights = a @ b, torch.rand(9, 21, generator=torch.Generator().manual_seed(seed))
    found = search_left_factor(
        a.to(device), b.to(device), target.to(device), 3, PERCENTILES, weights=weights.to(device)
    )
    errors = ((found.round_trip(a.to(device)).cpu() @ b - target).square() * weights).sum(1)
    low, high = row_ranges(a, PERCENTILES)
    each = [
        ((range_quantizer(low[i], high[i], 3, "codes").round_trip(a) @ b - target).square() * weights).sum(1)
        for i in range(len(PERCENTILES))
    ]
    torch.testing.assert_close(errors, torch.stack(each).amin(0), rtol=1e-4, atol=1e-6)


def test_ranges_are_percentiles(seed):
    values = random_matrix(4, 57, seed)
    low, high = row_ranges(values, [0.9, 1.0])
    for index, p in enumerate([0.9, 1.0]):
        np.testing.assert_allclose(low[index], np.quantile(values.numpy(), 1 - p, axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(high[index], np.quantile(values.numpy(), p, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_point", ["codes", "int16"])
@pytest.mark.parametrize("value", [0.0, 3.5, -0.25, 1e-9, 6e4])
def test_constant_rows_survive(value, zero_point):
    values = torch.full((1, 6), value)
    found = search_quantizer(values, 4, PERCENTILES, zero_point=zero_point)
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    torch.testing.assert_close(found.round_trip(values), values, rtol=1e-3, atol=1e-6)


def test_rows_of_one_sign_fit_int16(seed):
    values = 1000 + 1e-3 * random_matrix(3, 40, seed).abs()
    found = search_quantizer(values, 8, PERCENTILES, zero_point="int16")
    assert (found.zero_point.abs() <= 32767).all()
    torch.testing.assert_close(found.round_trip(values), values, rtol=5e-3, atol=0)


@pytest.mark.parametrize("zero_point", ["codes", "int16"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_stored_matrix_is_the_searched_one(bits, zero_point, seed):
    values = random_matrix(6, 19, seed) + 0.3
    found = search_quantizer(values, bits, PERCENTILES, zero_point=zero_point)
    stored = found.store(found.quantize(values))
    assert torch.equal(stored.dequantize(), found.round_trip(values))
    assert int(stored.codes.max()) < 2**bits
    assert stored.zero_point.dtype == (torch.uint8 if zero_point == "codes" else torch.int16)


def test_wide_percentiles_win_ties():
    values = torch.linspace(-1, 1, 50).reshape(1, -1)
    found = search_quantizer(values, 4, PERCENTILES, weights=torch.zeros(1, 50))
    assert float(found.scale) == pytest.approx(2 / 15, rel=1e-3)
