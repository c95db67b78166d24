"""What Gram matrices tell of factors: their directions, and the errors of all leading products (METHOD 4, 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_errors(total: Tensor | float, projected: Tensor, right: Tensor, gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """``‖W‖² - 2 Σ_{k≤r} p_k + Σ_{k,l≤r} P_kl`` of every rank r, in whatever metric the arguments are taken.

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
    """Eigenvectors of a Gram matrix as columns, by falling eigenvalue, the same ones on every device.

    A vector and its opposite are both eigenvectors, and which one comes out is the library's affair. Codes of factors
    depend on it, and so do costs and choices: it is the one whose cubes have a sum that is not negative.

    Args:
        gram: symmetric, ``(n, n)`` float64.

    Returns:
        ``(n, n)`` float64, orthonormal columns.
    """
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return torch.where(vectors.pow(3).sum(0) < 0, -vectors, vectors)
