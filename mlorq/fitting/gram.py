"""Gram matrices of factors: principal directions, and the errors of all leading products (METHOD 4, 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from mlorq.calibration.blocks import diagonal, identity


def leading_errors(total: Tensor | float, projected: Tensor, right: Tensor, gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """``‖W‖² - 2 Σ_{k≤r} p_k + Σ_{k,l≤r} P_kl`` for every rank r, in the metric of the arguments.

    ``p_k`` is the inner product of row k of ``projected`` with row k of ``right``, and ``P = gram_a ∘ gram_b``, whose
    leading-submatrix sums grow by ``P_rr + 2 Σ_{k<r} P_kr``.

    Args:
        total: the squared norm of W.
        projected: Âᵀ W, weighted, ``(rank, in_features)`` float64.
        right: B̂, ``(rank, in_features)`` float64.
        gram_a: Âᵀ Â, weighted, ``(rank, rank)`` float64.
        gram_b: B̂ B̂ᵀ, weighted, ``(rank, rank)`` float64.

    Returns:
        ``(rank,)`` float64, never negative; the error of rank r at entry ``r - 1``.
    """
    linear = (projected * right).sum(1)
    quadratic = gram_a * gram_b
    growth = 2 * quadratic.triu(1).sum(0) + quadratic.diagonal()
    return (total + torch.cumsum(growth - 2 * linear, 0)).clamp(min=0)


def principal_directions(gram: Tensor) -> Tensor:
    """Eigenvectors of a Gram matrix as columns, in descending order of eigenvalue, with the same signs on every device.

    The sign of an eigenvector is arbitrary and varies between libraries; codes of factors, costs and choices depend on
    it. Each eigenvector gets the sign for which the sum of its cubed entries is non-negative (METHOD 4).

    Args:
        gram: symmetric, ``(n, n)`` float64.

    Returns:
        ``(n, n)`` float64, orthonormal columns.
    """
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return torch.where(vectors.pow(3).sum(0) < 0, -vectors, vectors)


def damped(matrix: Tensor, share: float) -> Tensor:
    """``M + share · tr(M)/n · I``, which has a Cholesky factor; ``M + I`` if M is zero.

    Args:
        matrix: M, ``(n, n)`` float64, positive semi-definite; or its blocks (``mlorq.calibration.blocks``).
        share: of the mean diagonal.
    """
    unit, amount = identity(matrix), share * diagonal(matrix).mean()
    # Below the smallest normal number, factors lose all digits.
    return matrix + torch.where(amount > torch.finfo(matrix.dtype).tiny, amount, torch.ones_like(amount)) * unit
