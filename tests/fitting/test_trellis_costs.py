"""Local costs of trellis codes from one cycle of rows, against the costs of all codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mlorq.codecs.trellis import stream
from mlorq.fitting.covariance_fit import CovarianceFit, Metric
from mlorq.fitting.trellis import TrellisFit
from mlorq.fitting.trellis_costs import row_shares


def covariance(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    scales = torch.rand(size, generator=generator, dtype=torch.float64) + 0.2
    samples = samples * scales + samples[:, :1]
    return samples.T @ samples / len(samples)


def fit_of(rows: int, columns: int, seed: int) -> CovarianceFit:
    """A fit on one metric, judged on another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, 1, generator=generator) + 0.3)
    metric = Metric(covariance(columns, seed + 1), covariance(rows, seed + 2))
    judge = Metric(covariance(columns, seed + 3), covariance(rows, seed + 4))
    return CovarianceFit(weight, metric, [1.0], judge=judge)


def costs_of_codes(fit: CovarianceFit, widths: list[int]) -> list[float]:
    return [fit.cost(codes.dequantize()) for codes in fit.trellis(widths, sweeps=0)]


def test_exact_for_one_cycle(seed: int) -> None:
    fit, widths = fit_of(40, 24, seed), [1, 2, 4]
    assert len(stream(40).bounds) == 2
    np.testing.assert_allclose(fit.trellis_costs(widths), costs_of_codes(fit, widths), rtol=1e-4)


def test_near_for_several_cycles(seed: int) -> None:
    fit, widths = fit_of(300, 64, seed), [1, 2, 3]
    assert len(stream(300).bounds) == 4
    np.testing.assert_allclose(fit.trellis_costs(widths), costs_of_codes(fit, widths), rtol=0.2)


def test_shares_of_rows_are_the_costs_of_errors_with_feedback(seed: int) -> None:
    """A unit error of one row, spread over later cycles as the encoder spreads it."""
    rows = 250
    fit = TrellisFit(covariance(4, seed), covariance(rows, seed + 1), None)
    judge, (_, _, _, bounds) = covariance(rows, seed + 2), stream(rows)
    shares = row_shares(fit, bounds, judge)
    for row in np.random.default_rng(seed).integers(0, rows, 8).tolist():
        cycle = max(index for index, start in enumerate(bounds[:-1]) if start <= row)
        start, stop = bounds[cycle], bounds[cycle + 1]
        error = torch.zeros(rows, dtype=torch.float64)
        error[row] = 1
        u = fit.row_factor
        spread = torch.linalg.solve(u[start:stop, start:stop], u[start:stop, stop:])
        error[stop:] = spread.T @ error[start:stop]
        assert float(shares[row]) == pytest.approx(float(error @ judge @ error), rel=1e-9)


def test_no_cost_without_a_weight() -> None:
    fit = fit_of(200, 16, 5)
    zero = fit.of(torch.zeros(200, 16))
    assert zero.trellis_costs([2, 3]) == [0.0, 0.0]


def test_all_rows_are_coded_where_the_first_cycle_is_empty(seed: int) -> None:
    fit = fit_of(200, 16, seed)
    order, _, _, bounds = stream(200)
    weight = fit.weight.clone()
    weight[torch.from_numpy(order[: bounds[1]])] = 0
    fit = fit.of(weight)
    np.testing.assert_allclose(fit.trellis_costs([2, 3]), costs_of_codes(fit, [2, 3]), rtol=1e-12)
