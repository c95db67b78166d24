"""Second moments as blocks on the diagonal: ``(n, n)``, or ``(blocks, width, width)`` with ``blocks · width = n``.

A layer with many inputs has a Σ that neither fits into the memory nor can be factored in time. Correlations between
blocks of neighbouring inputs are left out there (``mlorq.memory.block_width``; METHOD 7), so that memory and time are
linear in the number of inputs. The functions of this file take either kind of matrix, and compute with a single one
what a plain product or solution does, to the last bit. What torch does with a stack of matrices needs no function:
``torch.linalg.cholesky``, ``M + λ I`` with the identity of one block, ``.mT``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def size(matrix: Tensor) -> int:
    """n, the number of rows and columns of the whole matrix."""
    return matrix.shape[-1] * (matrix.shape[0] if matrix.dim() == 3 else 1)


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonal of the whole matrix, ``(n,)``."""
    return matrix.diagonal(dim1=-2, dim2=-1).flatten()


def trace(matrix: Tensor) -> Tensor:
    """The sum of the diagonal."""
    return torch.stack([block.trace() for _, block in parts(matrix)]).sum()


def of_diagonal(values: Tensor, width: int) -> Tensor:
    """The matrix with this diagonal ``(n,)`` and blocks of a width; a single matrix if the width is n."""
    return torch.diag(values) if width == len(values) else torch.diag_embed(values.reshape(-1, width))


def identity(matrix: Tensor) -> Tensor:
    """The identity of one block, which broadcasts to all of them, in the matrix's dtype and on its device."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def parts(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The blocks ``(width, width)``, each with its rows or columns in the whole matrix."""
    width = matrix.shape[-1]
    for index, block in enumerate(matrix if matrix.dim() == 3 else matrix.unsqueeze(0)):
        yield slice(index * width, (index + 1) * width), block


def multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    """``X M`` for X ``(rows, n)``."""
    if matrix.dim() == 2:
        return rows @ matrix
    return torch.cat([rows[:, part] @ block for part, block in parts(matrix)], dim=1)


def products(left: Tensor, right: Tensor, width: int) -> Tensor:
    """The blocks of ``Xᵀ Y`` for X and Y ``(rows, n)``; the whole product if the width is n."""
    count = left.shape[1] // width
    if count == 1:
        return left.T @ right
    pairs = zip(left.split(width, dim=1), right.split(width, dim=1), strict=True)
    return torch.stack([one.T @ other for one, other in pairs])


def solve(rows: Tensor, factor: Tensor) -> Tensor:
    """``X (L Lᵀ)⁻¹`` for X ``(rows, n)`` and the Cholesky factor L."""
    if factor.dim() == 2:
        return torch.cholesky_solve(rows.T, factor).T
    return torch.cat([torch.cholesky_solve(rows[:, part].T, block).T for part, block in parts(factor)], dim=1)


def solve_lower(rows: Tensor, factor: Tensor) -> Tensor:
    """``X L⁻¹`` for X ``(rows, n)`` and L lower triangular."""

    def one(own: Tensor, block: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(block, own, upper=False, left=False)
        return found

    if factor.dim() == 2:
        return one(rows, factor)
    return torch.cat([one(rows[:, part], block) for part, block in parts(factor)], dim=1)


def blocks_of(matrix: Tensor, width: int) -> Tensor:
    """The blocks of a width on the diagonal of a single matrix; a matrix that has this width already is returned."""
    if matrix.shape[-1] == width:
        return matrix
    starts = range(0, len(matrix), width)
    return torch.stack([matrix[start : start + width, start : start + width] for start in starts])
