"""Layers and inputs with zeros, or with magnitudes far apart: no method fails or is far behind nearest rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlorq.forms.base import Candidate
from mlorq.rounding import METHODS
from mlorq.rounding.output_error import output_error
from tests.layers import hessian_fit, round_layer
from tests.rounding.test_rounding import moments_of

ROWS, COLUMNS = 12, 20
CANDIDATES = [
    Candidate("Q", bits=4),
    Candidate("LR", bits_a=4, bits_b=4, rank=6),
    Candidate("QLR", bits=2, bits_a=4, bits_b=4, rank=3),
    Candidate("TCQ", bits=3),
]
LAYER_METHODS = ["nearest", "gptq", "closed_form", "lra", "erq"]


def column_up(weight: Tensor, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """A small input that large weights make up for, as after a small row of the layer before."""
    weight, x = weight.clone(), x.clone()
    weight[:, 3] *= factor
    x[:, 3] /= factor
    return weight, x


def zeros(weight: Tensor, x: Tensor, *, rows: slice = slice(0), columns: slice = slice(0), inputs: slice = slice(0)):
    weight, x = weight.clone(), x.clone()
    weight[rows] = 0
    weight[:, columns] = 0
    x[:, inputs] = 0
    return weight, x


CASES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "zero weight": lambda w, x: zeros(w, x, rows=slice(None)),
    "zero rows": lambda w, x: zeros(w, x, rows=slice(1, ROWS)),
    "zero columns": lambda w, x: zeros(w, x, columns=slice(1, COLUMNS)),
    "zero inputs": lambda w, x: zeros(w, x, inputs=slice(None)),
    "half of the inputs zero": lambda w, x: zeros(w, x, inputs=slice(10, None)),
    "constant inputs": lambda w, x: (w, x[:1].expand_as(x)),
    "constant weight": lambda w, x: (torch.full_like(w, 0.3), x),
    "rank one": lambda w, x: (w[:, :1] * w[:1], x),
    "small row": lambda w, x: (torch.cat([w[:1] * 1e-9, w[1:]]), x),
    "tiny row": lambda w, x: (torch.cat([w[:1] * 1e-5, w[1:]]), x),
    "denormal row": lambda w, x: (torch.cat([w[:1] * 1e-40, w[1:]]), x),
    "large row": lambda w, x: (torch.cat([w[:1] * 1e4, w[1:]]), x),
    "large column": lambda w, x: column_up(w, x, 1e3),
    "very large column": lambda w, x: column_up(w, x, 1e5),
    "small inputs": lambda w, x: (w, x * 1e-12),
    "large inputs": lambda w, x: (w, x * 1e6),
}


def layer(case: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    return CASES[case](weight, torch.randn(200, COLUMNS, generator=generator) @ mixing)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.form)
@pytest.mark.parametrize("case", CASES)
def test_no_method_fails_or_is_far_behind_nearest_rounding(case, candidate, seed):
    weight, x = layer(case, seed)
    drift = 0.02 * x * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    moments = moments_of(x, x + drift)
    hessian = x.square().mean(0).expand_as(weight)
    fit = hessian_fit(weight, hessian)
    found = {}
    for method in LAYER_METHODS:
        settings = {"iterations": 20} if "iterations" in METHODS[method].layer_settings.model_fields else {}
        result = round_layer(method, fit, candidate, moments, torch.zeros(ROWS), **settings)
        dense = result.layer.dense()
        assert dense.isfinite().all(), method
        found[method] = output_error(weight, dense, moments)
        if case == "zero weight":
            assert not dense.any(), method
    floor = output_error(weight, weight, moments) + 1e-12 * float((x @ weight.T).square().mean())
    assert max(found.values()) <= 2 * max(found["nearest"], floor), found


@pytest.mark.parametrize("factor", [1e-8, 1e-13, 1e8])
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.form)
def test_the_magnitude_of_a_weight_does_not_matter(candidate, factor, seed):
    weight, x = layer("small inputs", seed)
    x = 1e12 * x
    moments, hessian = moments_of(x, x), x.square().mean(0).expand_as(weight)
    for method in LAYER_METHODS:
        settings = {"iterations": 20} if "iterations" in METHODS[method].layer_settings.model_fields else {}
        errors = {}
        for one in (1.0, factor):
            fit = hessian_fit(weight * one, hessian)
            result = round_layer(method, fit, candidate, moments, torch.zeros(ROWS), **settings)
            errors[one] = output_error(weight, result.layer.dense() / one, moments)
            for matrix in result.layer.matrices.values():
                again = matrix.codec.unpack(matrix.codec.pack(matrix), matrix.shape[1])
                assert torch.equal(again.dequantize(), matrix.dequantize()), method
        assert errors[factor] <= 1.3 * errors[1.0] + 1e-9, (method, errors)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_a_tiny_row_is_as_good_as_any_other(method, seed):
    weight, x = layer("tiny row", seed)
    fit = hessian_fit(weight * torch.cat([torch.full((1, 1), 1e-3), torch.ones(ROWS - 1, 1)]))
    settings = {"iterations": 20} if "iterations" in METHODS[method].layer_settings.model_fields else {}
    result = round_layer(method, fit, Candidate("Q", bits=6), moments_of(x, x), torch.zeros(ROWS), **settings)
    wanted, found = fit.weight[0] @ x.T, result.layer.dense()[0] @ x.T
    assert (found - wanted).square().sum() <= 0.02 * wanted.square().sum()
