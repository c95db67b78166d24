"""Weights that codes with float16 scales cannot hold: too large, or in rows that would become zero."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max  # of a scale, and so of a weight at any bit-width
# Scales below 2⁻²⁴ do not exist: rows below this have less than 7 bits, and below 2⁻²⁵ they become zeros.
LEAST = 2.0**-18
SHARE = 0.25  # a weight with this share of such rows stays float


def why_float(weight: Tensor) -> str | None:
    """The reason why a weight ``(rows, …)`` has to stay float; None if float16 scales hold it."""
    if weight.is_meta or not weight.numel():
        return None
    largest = weight.detach().flatten(1).abs().amax(1).float()
    if float(largest.max()) > LARGEST:
        return f"its largest weight, {float(largest.max()):.3g}, is too large for float16 scales"
    small = int(_small(largest).sum())
    if small >= SHARE * len(largest):
        return f"{small} of {len(largest)} rows are below {LEAST:.1g}, too small for float16 scales"
    return None


def small_rows(weight: Tensor) -> int:
    """Number of rows of a matrix, other than zeros, that are too small for float16 scales."""
    return 0 if weight.is_meta else int(_small(weight.detach().flatten(1).abs().amax(1).float()).sum())


def _small(largest: Tensor) -> Tensor:
    return (largest > 0) & (largest < LEAST)
