"""Weighted singular value decomposition of a layer's weight (METHOD 4; MLoRQ, arXiv 2507.09616).

``D = diag(sqrt(Σ_j H_ij) + 1e-8)``, ``D W = U S Vᵀ``; ``A = D⁻¹ U``, ``B = S Vᵀ`` (``U_SV``) or ``A = D⁻¹ U S``,
``B = Vᵀ`` (``US_V``). The leading r columns of A and rows of B are the best rank-r product in the metric D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlorq.fitting.gram import principal_directions
from mlorq.fitting.settings import Split


@dataclass(frozen=True)
class Factors:
    """``W = A B``, columns of A and rows of B in descending order of singular values.

    Attributes:
        a: ``(out_features, min(out_features, in_features))`` float64.
        b: ``(min(out_features, in_features), in_features)`` float64.
        singular_values: ``(min(out_features, in_features),)`` of ``D W`` with D divided by its mean.
    """

    a: Tensor
    b: Tensor
    singular_values: Tensor


def weighted_svd(weight: Tensor, hessian: Tensor, split: Split = "U_SV") -> Factors:
    """Factor W in the metric of its label-free Hessian.

    D is divided by its mean first: the product is unchanged, and the factors stay in the range of float16
    scales however small the Hessian is. The decomposition comes from the eigenvectors of the smaller Gram
    matrix in float64, several times cheaper than an SVD; the other factor is the exact projection, so that the
    full-rank product is W whatever the accuracy of the smallest singular values.

    Args:
        weight: W, ``(out_features, in_features)``.
        hessian: label-free Hessian H, same shape, non-negative.
        split: which factor carries the singular values.
    """
    w = weight.to(torch.float64)
    d = hessian.to(torch.float64).sum(1).sqrt() + 1e-8
    d = (d / d.mean()).unsqueeze(1)
    dw = d * w
    if w.shape[0] <= w.shape[1]:
        u = principal_directions(dw @ dw.T)
        sv = u.T @ dw  # S Vᵀ, exactly orthogonal rows up to rounding
        s = sv.norm(dim=1)
        a, b = (u, sv) if split == "U_SV" else (u * s, sv / _positive(s).unsqueeze(1))
    else:
        v = principal_directions(dw.T @ dw)
        us = dw @ v
        s = us.norm(dim=0)
        a, b = (us / _positive(s), v.T * s.unsqueeze(1)) if split == "U_SV" else (us, v.T)
    return Factors(a / d, b, s)


def _positive(values: Tensor) -> Tensor:
    """Values clamped to be safe divisors: zero singular values belong to vectors that are zero anyway."""
    return values.clamp(min=torch.finfo(values.dtype).tiny)
