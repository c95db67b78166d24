"""Trellis codes of a layer: feedback in both directions, scales, rotation, unusual weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from mlorq.codecs.trellis import ZERO_SCALE
from mlorq.fitting.covariance_fit import CovarianceFit, Metric
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.fitting.settings import FitSettings
from mlorq.fitting.trellis import TrellisFit


def covariance(size: int, seed: int, decay: float = 0.9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (directions * decay ** torch.arange(size, dtype=torch.float64)) @ directions.T


def weight_of(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()


def cost(difference: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    wide = difference.double()
    return float(((gradients @ wide) @ inputs * wide).sum())


def test_feedback_lowers_the_error_in_its_metric() -> None:
    weight, inputs, gradients = weight_of(200, 48, 1), covariance(48, 2), covariance(200, 3)
    identity_in, identity_out = torch.eye(48, dtype=torch.float64), torch.eye(200, dtype=torch.float64)

    def error(own_inputs: Tensor, own_gradients: Tensor) -> float:
        codes = TrellisFit(own_inputs, own_gradients, 0).codes(weight, 2)
        return cost(codes.dequantize() - weight, inputs, gradients)

    none, columns = error(identity_in, identity_out), error(inputs, identity_out)
    rows, both = error(identity_in, gradients), error(inputs, gradients)
    assert columns < 0.8 * none
    assert rows < 0.95 * none
    assert both < 0.95 * columns
    assert both < 0.8 * rows


def test_sweeps_lower_the_error() -> None:
    weight, inputs, gradients = weight_of(96, 40, 4), covariance(40, 5), torch.eye(96, dtype=torch.float64)
    fit = TrellisFit(inputs, gradients, 0)
    errors = [cost(fit.codes(weight, 3, sweeps).dequantize() - weight, inputs, gradients) for sweeps in (0, 1, 2)]
    assert errors[1] < errors[0]
    assert errors[2] < 1.02 * errors[1]


def test_rotation_helps_weights_with_outliers() -> None:
    weight = weight_of(96, 64, 6)
    weight[:, ::16] *= 12
    inputs, gradients = torch.eye(64, dtype=torch.float64), torch.eye(96, dtype=torch.float64)
    found = {}
    for seed in (None, 0):
        codes = TrellisFit(inputs, gradients, seed).codes(weight, 3)
        assert int(codes.rotation) == (-1 if seed is None else seed)
        found[seed] = float((codes.dequantize() - weight).square().mean())
    assert found[0] < 0.8 * found[None]


def test_more_bits_give_less_error() -> None:
    weight, inputs, gradients = weight_of(100, 30, 7), covariance(30, 8), covariance(100, 9)
    fit = TrellisFit(inputs, gradients, 0)
    errors = [cost(fit.codes(weight, bits).dequantize() - weight, inputs, gradients) for bits in (1, 2, 3, 4, 5, 6)]
    assert all(later < 0.4 * earlier for earlier, later in itertools.pairwise(errors))


def test_important_rows_get_the_smaller_errors() -> None:
    weight = weight_of(192, 32, 10)
    importance = torch.ones(192, dtype=torch.float64)
    importance[:96] = 30.0
    codes = TrellisFit(torch.eye(32, dtype=torch.float64), torch.diag(importance), 0).codes(weight, 3)
    relative = (codes.dequantize() - weight).square().sum(1) / weight.square().sum(1)
    assert float(relative[:96].mean()) < 0.6 * float(relative[96:].mean())


@pytest.mark.parametrize("case", ["zeros", "a row of zeros", "tiny rows", "singular", "one column"])
def test_unusual_weights(case: str) -> None:
    rows, columns = 40, 1 if case == "one column" else 24
    weight, inputs = weight_of(rows, columns, 11), covariance(columns, 12)
    gradients = torch.eye(rows, dtype=torch.float64)
    if case == "zeros":
        weight.zero_()
    elif case == "a row of zeros":
        weight[5] = 0
    elif case == "tiny rows":
        weight[:20] *= 1e-12
    elif case == "singular":
        inputs = torch.zeros_like(inputs)
        inputs[0, 0] = 1
        gradients = torch.zeros_like(gradients)
        gradients[0, 0] = 1
    codes = TrellisFit(inputs, gradients, 0).codes(weight, 4)
    dense = codes.dequantize()
    assert torch.isfinite(dense).all()
    error = float((dense - weight).square().sum())
    assert error <= (0.02 if case != "singular" else 1.0) * float(weight.square().sum())
    if case in ("zeros", "a row of zeros"):
        assert int(codes.scale[5]) == ZERO_SCALE


def test_same_codes_every_time_and_for_both_fits() -> None:
    weight, inputs, gradients = weight_of(64, 20, 13), covariance(20, 14), covariance(64, 15)
    fit = CovarianceFit(weight, Metric(inputs, gradients), [1.0], rotation=4)
    first, (_, second) = fit.trellis([3])[0], fit.of(weight).trellis([2, 3])
    assert all(torch.equal(first.tensors()[part], second.tensors()[part]) for part in first.tensors())
    assert int(first.rotation) == 4
    hessian = HessianFit(weight, torch.rand(64, 20) + 0.1, FitSettings(rotation=None))
    (codes,) = hessian.trellis([3])
    assert int(codes.rotation) == -1
    relative = float((codes.dequantize() - weight).square().sum() / weight.square().sum())
    assert relative < 0.03


def test_least_squares_scales_are_kept_in_range() -> None:
    weight = weight_of(12, 6, 16)
    codes = TrellisFit(torch.eye(6, dtype=torch.float64), torch.eye(12, dtype=torch.float64), 0).codes(weight, 1)
    assert np.isfinite(codes.scales().numpy()).all()
    assert codes.shape == (12, 6)
