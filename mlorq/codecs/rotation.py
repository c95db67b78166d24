"""A fixed orthogonal transform of the columns of a matrix, the same to the last bit on every device (docs/TRELLIS.md).

``x Q`` with ``Q = diag(σ) T / √n``: seeded signs σ, and ``T = C ⊗ H``. H is the Hadamard matrix of the largest power of
two that divides n, C the matrix ``cos + sin`` of the discrete Hartley transform of the odd factor. T is symmetric and
``T² = n I``. It makes the entries of a row nearly Gaussian (QuIP#, arXiv 2402.04396, with Hadamard matrices alone).
Of a very wide matrix, blocks of columns of one width are transformed, each by the T of its width, so that second
moments in blocks remain such (``mlorq.calibration.blocks``).

The transform is a fixed sequence of element-wise operations, so that decoding does not depend on the order in which a
library sums a matrix product. It contains no branch on a seed's value, so that decoding can be traced.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mlorq.memory import block_width

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # constants of splitmix64


def rotate(values: Tensor, seed: int, width: int | None = None) -> Tensor:
    """``x Q`` for rows x, ``(rows, n)``, in the dtype of ``values``.

    Args:
        values: the rows.
        seed: of the signs.
        width: of the blocks that are transformed; default: n.
    """
    return _blocks(values * signs(values.shape[1], seed, values.device).to(values.dtype), width)


def rotate_back(values: Tensor, seed: int | Tensor, width: int | None = None) -> Tensor:
    """``x Qᵀ``, the inverse of ``rotate``; the seed can be an integer tensor of one element."""
    return _blocks(values, width) * signs(values.shape[1], seed, values.device).to(values.dtype)


def rotate_both(matrix: Tensor, seed: int) -> Tensor:
    """``Qᵀ M Q`` of a symmetric matrix, ``(n, n)``, or of its blocks ``(blocks, width, width)``, which Q transforms."""
    if matrix.dim() == 2:
        return rotate(rotate(matrix, seed).T, seed).T.contiguous()
    count, width, _ = matrix.shape
    sign = signs(count * width, seed, matrix.device).to(matrix.dtype).reshape(count, 1, width)
    pairs = zip(matrix, sign, strict=True)
    return torch.stack([_transform(_transform(block * own).T * own).T for block, own in pairs])


def stored_seed(seed: int | None, columns: int, width: int) -> int:
    """The number that says how a matrix is rotated: the seed; ``-2 - seed`` for blocks; -1 for none.

    Raises:
        ValueError: blocks of another width than those of the format (docs/TRELLIS.md).
    """
    if seed is None:
        return -1
    if width == columns:
        return seed
    if width != block_width(columns):
        raise ValueError(f"{columns} columns are rotated in blocks of {block_width(columns)}, not {width}")
    return -2 - seed


def rotated_back(values: Tensor, stored: Tensor) -> Tensor:
    """``rotate_back`` as a number of ``stored_seed`` says, an integer tensor of one element."""
    found = torch.where(stored < 0, values, rotate_back(values, stored.clamp(min=0)))
    if (width := block_width(values.shape[1])) == values.shape[1]:
        return found
    return torch.where(stored < -1, rotate_back(values, (-2 - stored).clamp(min=0), width), found)


def signs(size: int, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """σ, ``(size,)`` of −1 and 1: the top bits of ``mixed_bits`` of column and ``seed · 2³²``."""
    numbers = torch.arange(size, device=device)
    mixed = mixed_bits(numbers + (seed << 32 if isinstance(seed, int) else seed.long() << 32))
    return 1 + 2 * (mixed >> 63)  # an arithmetic shift: −1 if the top bit is set


def mixed_bits(numbers: Tensor) -> Tensor:
    """64 pseudo-random bits for each int64 number: splitmix64 (Steele et al., OOPSLA 2014)."""
    z: Tensor = (numbers + 1) * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    z = z ^ _shifted(z, 31)
    return z


def _signed(pattern: int) -> int:
    return pattern - 2**64 if pattern >= 2**63 else pattern


def _shifted(z: Tensor, places: int) -> Tensor:
    """A logical shift to the right."""
    return torch.bitwise_and(z >> places, 2 ** (64 - places) - 1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def hartley(size: int) -> Tensor:
    """``cos(2π i j / size) + sin(2π i j / size)``, float64; angles are reduced exactly first."""
    angles = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return torch.from_numpy(np.cos(angles) + np.sin(angles))


def _blocks(values: Tensor, width: int | None) -> Tensor:
    """``x T / √width`` for the blocks x of rows."""
    if width is None:
        return _transform(values)
    return _transform(values.reshape(-1, width)).reshape(values.shape)


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
        matrix = hartley(odd).to(values.device, values.dtype)
        total = found[:, :1] * matrix[0].reshape(1, odd, 1)
        for index in range(1, odd):
            total = total + found[:, index : index + 1] * matrix[index].reshape(1, odd, 1)
        found = total
    return found.reshape(rows, size) * (1 / math.sqrt(size))
