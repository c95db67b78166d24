"""Iterations of ``mlorq.rounding.adaptive_rounding`` as Triton kernels, for CUDA (METHOD 6).

In PyTorch an iteration launches some dozens of small kernels per matrix. Here it launches two per matrix in addition to
the matrix products: one for the dequantized values, and one for all operations from their gradient to the next α
(derivative of the soft rounding, regulariser, RAdam). The scalars of all iterations are in a table on the device, so
that an iteration can be recorded once and replayed (``mlorq.fitting.cuda``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlorq.rounding.rectified_sigmoid import DECAYS, EPSILON, GAMMA, ZETA, radam_scalars

BLOCK = 1024  # entries per program
LEAST, STRETCH = tl.constexpr(GAMMA), tl.constexpr(ZETA - GAMMA)
FIRST, SECOND, TINY = tl.constexpr(DECAYS[0]), tl.constexpr(DECAYS[1]), tl.constexpr(EPSILON)


@triton.jit
def _rectified(alpha):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(tl.sigmoid(alpha) * STRETCH + LEAST, 0.0), 1.0)


@triton.jit
def _values(alpha, base, scale, zero, top, values, columns, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    row = entry // columns
    code = tl.load(base + entry, mask=inside, other=0.0) + _rectified(tl.load(alpha + entry, mask=inside, other=0.0))
    code = tl.minimum(tl.maximum(code, 0.0), top)
    zeros, scales = tl.load(zero + row, mask=inside, other=0.0), tl.load(scale + row, mask=inside, other=1.0)
    tl.store(values + entry, (code - zeros) * scales, mask=inside)


@triton.jit
def _descend(  # type: ignore[no-untyped-def]
    alpha, mean, square, gradient, base, scale, table, iteration, top, pull, columns, count, BLOCK: tl.constexpr
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    own = tl.load(alpha + entry, mask=inside, other=0.0)
    at = table + 3 * tl.load(iteration)
    beta, rate, rectified = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    sigmoid, h = tl.sigmoid(own), _rectified(own)
    code = tl.load(base + entry, mask=inside, other=0.0) + h
    slope = tl.load(scale + entry // columns, mask=inside, other=0.0)
    slope = tl.where((code >= 0.0) & (code <= top), slope, 0.0)
    # d/dh of mean(1 - |2h-1|^β); pull is -2 λ divided by the number of entries.
    centred = 2.0 * h - 1.0
    power = tl.exp2((beta - 1.0) * tl.log2(tl.maximum(tl.abs(centred), 1e-30)))
    sign = tl.where(centred > 0.0, 1.0, tl.where(centred < 0.0, -1.0, 0.0))
    by_h = tl.load(gradient + entry, mask=inside, other=0.0) * slope + pull * beta * sign * power
    by_alpha = tl.where((h > 0.0) & (h < 1.0), by_h * (STRETCH * sigmoid * (1.0 - sigmoid)), 0.0)
    first = FIRST * tl.load(mean + entry, mask=inside, other=0.0) + (1.0 - FIRST) * by_alpha
    second = SECOND * tl.load(square + entry, mask=inside, other=0.0) + (1.0 - SECOND) * by_alpha * by_alpha
    adapted = tl.where(rectified > 0.0, rectified / (tl.sqrt_rn(second) + TINY), 1.0)
    tl.store(mean + entry, first, mask=inside)
    tl.store(square + entry, second, mask=inside)
    tl.store(alpha + entry, own - rate * first * adapted, mask=inside)


class Iterations:
    """The scalars of all iterations on a device, and a counter of iterations.

    Args:
        betas: exponent β of the regulariser, by iteration.
        learning_rate: RAdam's step size.
        device: device of the table.
    """

    def __init__(self, betas: Sequence[float], learning_rate: float, device: torch.device) -> None:
        rows = [(beta, *radam_scalars(index + 1, learning_rate)) for index, beta in enumerate(betas)]
        self.table = torch.tensor(rows, dtype=torch.float32, device=device)
        self.iteration = torch.zeros((), dtype=torch.int32, device=device)

    def done(self) -> None:
        """Advance to the next iteration."""
        self.iteration.add_(1)


class FusedMatrix:
    """α of one matrix, with the state of RAdam.

    Args:
        alpha: ``(rows, columns)`` float32, contiguous; modified by every iteration.
        base: ``floor(w/s) + z``, same shape.
        scale, zero: scales and zero-points of the rows, ``(rows,)``.
        top: the largest code.
    """

    def __init__(self, alpha: Tensor, base: Tensor, scale: Tensor, zero: Tensor, top: int) -> None:
        self.alpha, self.base = alpha, base.contiguous()
        self.scale, self.zero, self.top = scale.contiguous(), zero.contiguous(), float(top)
        self.mean, self.square = torch.zeros_like(alpha), torch.zeros_like(alpha)

    def values(self) -> Tensor:
        """Dequantized values with soft rounding, ``(rows, columns)``."""
        found = torch.empty_like(self.alpha)
        count, columns = found.numel(), found.shape[1]
        with torch.cuda.device_of(found):
            _values[(triton.cdiv(count, BLOCK),)](
                self.alpha, self.base, self.scale, self.zero, self.top, found, columns, count, BLOCK=BLOCK
            )
        return found

    def descend(self, gradient: Tensor, iterations: Iterations, regularisation: float) -> None:
        """One step of RAdam, given the gradient of the loss by the values."""
        count, columns = self.alpha.numel(), self.alpha.shape[1]
        with torch.cuda.device_of(gradient):
            _descend[(triton.cdiv(count, BLOCK),)](
                self.alpha,
                self.mean,
                self.square,
                gradient.contiguous(),
                self.base,
                self.scale,
                iterations.table,
                iterations.iteration,
                self.top,
                -2.0 * regularisation / count,
                columns,
                count,
                BLOCK=BLOCK,
            )
