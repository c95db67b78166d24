"""Weights that no scales hold: too large, or in rows that would become zero."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2.0**50  # squared errors of larger weights, and of products with them, leave the range of float32
LEAST = 2.0**-50  # so do those of rows below this
# What float16 scales hold. Scales below 2⁻²⁴ do not exist: rows below 2⁻¹⁸ have less than 7 bits, and below 2⁻²⁵ they
# become zeros. Linear layers and convolutions then have float32 scales (``codecs.affine.storage_for``).
LARGEST_FLOAT16 = torch.finfo(torch.float16).max
LEAST_FLOAT16 = 2.0**-18
SHARE = 0.25  # a weight with this share of such rows stays float


def why_float(weight: Tensor, *, float16: bool = False) -> str | None:
    """The reason why a weight ``(rows, …)`` has to stay float; None if scales hold it.

    Args:
        weight: the weight.
        float16: whether its scales can only be float16.
    """
    if weight.is_meta or not weight.numel():
        return None
    most, least = (LARGEST_FLOAT16, LEAST_FLOAT16) if float16 else (LARGEST, LEAST)
    scales = "float16 scales" if float16 else "errors in float32"
    largest = weight.detach().flatten(1).abs().amax(1).float()
    if not float(largest.max()) <= most:
        return f"its largest weight, {float(largest.max()):.3g}, is too large for {scales}"
    small = int(_small(largest, least).sum())
    if small >= SHARE * len(largest):
        return f"{small} of {len(largest)} rows are below {least:.1g}, too small for {scales}"
    return None


def small_rows(weight: Tensor) -> int:
    """Number of rows of a matrix, other than zeros, that are too small for their errors to be weighed."""
    return 0 if weight.is_meta else int(_small(weight.detach().flatten(1).abs().amax(1).float(), LEAST).sum())


def _small(largest: Tensor, least: float) -> Tensor:
    return (largest > 0) & (largest < least)
