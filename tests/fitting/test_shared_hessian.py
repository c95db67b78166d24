"""Hessians that layers share: the same object for equal Σ, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from mlorq.codecs.rotation import rotate_both
from mlorq.fitting import shared_hessian as module
from mlorq.fitting.gptq import RowHessian
from mlorq.fitting.shared_hessian import KEPT, shared_hessian
from mlorq.fitting.trellis import TrellisFit


def covariance(seed: int, columns: int = 24) -> Tensor:
    x = torch.randn(80, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / 80


def test_equal_inputs_share_their_factors(seed: int) -> None:
    sigma = covariance(seed)
    first, again = shared_hessian(sigma), shared_hessian(sigma.clone())
    assert first is again
    rotated = shared_hessian(sigma.clone(), 3)
    assert rotated is not first
    assert rotated is shared_hessian(sigma, 3)
    assert rotated is not shared_hessian(sigma, 4)
    assert torch.equal(first.shares, RowHessian(sigma).shares)
    assert torch.equal(rotated.matrix, rotate_both(sigma, 3))


def test_a_small_difference_is_another_one(seed: int) -> None:
    sigma = covariance(seed)
    other = sigma.clone()
    other[0, 0] += 1e-12
    assert shared_hessian(sigma) is not shared_hessian(other)
    assert shared_hessian(sigma) is not shared_hessian(sigma.float())


def test_only_the_last_ones_and_no_large_ones_are_kept(seed: int, monkeypatch) -> None:
    sigma = covariance(seed)
    first = shared_hessian(sigma)
    for index in range(KEPT):
        shared_hessian(covariance(seed + 1 + index))
    assert shared_hessian(sigma) is not first
    monkeypatch.setattr(module, "MOST_ENTRIES", 64)
    assert shared_hessian(covariance(seed + 9)) is not shared_hessian(covariance(seed + 9))


def test_two_layers_with_one_input_have_one_factorisation(seed: int) -> None:
    sigma = covariance(seed)
    fits = [TrellisFit(sigma.clone(), covariance(seed + index, 16), 5) for index in range(3)]
    assert len({id(fit.hessian) for fit in fits}) == 1
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
    shared = fits[2].codes(weight, 2)
    module._kept.clear()
    alone = TrellisFit(sigma, covariance(seed + 2, 16), 5).codes(weight, 2)
    assert torch.equal(shared.dequantize(), alone.dequantize())
