"""A fixed orthogonal transform of the columns of a matrix, the same to the last bit on every device (docs/TRELLIS.md).

``x Q`` with ``Q = diag(σ) T / √n``: seeded signs σ, and ``T = C ⊗ H``. H is the Hadamard matrix of the largest power of
two that divides n, C the matrix ``cos + sin`` of the discrete Hartley transform of the odd factor. T is symmetric and
``T² = n I``. It makes the entries of a row nearly Gaussian (QuIP#, arXiv 2402.04396, with Hadamard matrices alone).

The transform is a fixed sequence of element-wise operations, so that decoding does not depend on the order in which a
library sums a matrix product.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor


def rotate(values: Tensor, seed: int) -> Tensor:
    """``x Q`` for rows x, ``(rows, n)``, in the dtype of ``values``."""
    return _transform(values * _signs(values.shape[1], seed, values))


def rotate_back(values: Tensor, seed: int) -> Tensor:
    """``x Qᵀ``, the inverse of ``rotate``."""
    return _transform(values) * _signs(values.shape[1], seed, values)


def rotate_both(matrix: Tensor, seed: int) -> Tensor:
    """``Qᵀ M Q`` of a symmetric matrix, ``(n, n)``."""
    return rotate(rotate(matrix, seed).T, seed).T.contiguous()


def mixed_bits(numbers: np.ndarray, seed: int) -> np.ndarray:
    """64 pseudo-random bits for each number: splitmix64 of ``number + seed · 2³²`` (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64((seed << 32) % 2**64)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


@cache
def _sign_array(size: int, seed: int) -> np.ndarray:
    top = mixed_bits(np.arange(size), seed) >> np.uint64(63)
    return 1.0 - 2.0 * top.astype(np.float64)


def _signs(size: int, seed: int, like: Tensor) -> Tensor:
    return torch.from_numpy(_sign_array(size, seed)).to(like.device, like.dtype)


@cache
def _hartley(size: int) -> np.ndarray:
    """``cos(2π i j / size) + sin(2π i j / size)``, float64; angles are reduced exactly first."""
    angles = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return np.cos(angles) + np.sin(angles)


def _transform(values: Tensor) -> Tensor:
    """``x T / √n`` for rows x."""
    rows, size = values.shape
    power = size & -size  # the largest power of two that divides the size
    odd = size // power
    found = values.reshape(rows, odd, power)
    step = 1
    while step < power:
        pairs = found.reshape(rows, odd, power // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        found = torch.stack((first + second, first - second), dim=-2).reshape(rows, odd, power)
        step *= 2
    if odd > 1:
        matrix = torch.from_numpy(_hartley(odd)).to(values.device, values.dtype)
        total = found[:, :1] * matrix[0].reshape(1, odd, 1)
        for index in range(1, odd):
            total = total + found[:, index : index + 1] * matrix[index].reshape(1, odd, 1)
        found = total
    return found.reshape(rows, size) * (1 / math.sqrt(size))
