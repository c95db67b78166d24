"""Trellis codes of a layer's weight under Σ and G (METHOD 10).

The local cost ``tr(G ΔW Σ ΔWᵀ)`` has feedback in both directions. Along the columns it is that of GPTQ
(arXiv 2210.17323): the error of a column is spread over the later columns through the Cholesky factor of Σ⁻¹. Along the
rows, blocks of the trellis follow one another: with rows in the order of the stream, and ``G⁻¹ = UᵀU``, U upper
triangular, the error E of block b is spread over the later blocks (in the spirit of YAQA, arXiv 2505.22988),

    T_later ← T_later - (U_bb⁻¹ U_b,later)ᵀ E,

and the errors of its rows are weighted by the diagonal of ``(U_bbᵀ U_bb)⁻¹``, what is left of G once the later blocks
compensate. After a pass over a block's columns, scales are refitted by least squares and all columns coded again, each
given all others.

Where ``mlorq.fitting.viterbi`` has kernels for the weight's device, everything stays there; else columns are coded on
the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mlorq.calibration.blocks import multiply, parts
from mlorq.codecs.rotation import rotate, stored_seed
from mlorq.codecs.trellis import ZERO_SCALE, TrellisMatrix, nearest_scale_codes, scale_values, stream, tables
from mlorq.fitting.gptq import BLOCK, RowHessian
from mlorq.fitting.shared_hessian import shared_hessian
from mlorq.fitting.viterbi import TensorBlock, tensor_functions

T = TypeVar("T")

ROW_DAMPING = 1.0  # added to the diagonal of G, relative to its mean (chosen on MiniLM and ViT-Tiny: benchmarks/)
HEADROOM = 2.0  # of the largest scale over the largest row: feedback lets rows grow
LARGEST_BASE = 1e30  # bases stay finite in float32


class TrellisFit:
    """What all trellis codes of one layer share.

    Args:
        inputs: Σ, ``(in_features, in_features)``, or its blocks (``mlorq.calibration.blocks``); positive semi-definite.
            The rotation stays within a block.
        gradients: G, ``(out_features, out_features)``, positive semi-definite.
        seed: of the rotation of the columns; None: no rotation.
    """

    def __init__(self, inputs: Tensor, gradients: Tensor, seed: int | None) -> None:
        self.seed = seed
        self.width = inputs.shape[-1]
        self._inputs = inputs.double()
        self._gradients = gradients.double()

    @cached_property
    def hessian(self) -> RowHessian:
        """Σ of the rotated inputs."""
        return shared_hessian(self._inputs, self.seed)

    @cached_property
    def row_factor(self) -> Tensor:
        """U, the upper Cholesky factor of the damped G⁻¹, with rows in the order of the stream, float64."""
        order = torch.from_numpy(stream(len(self._gradients)).order).to(self._gradients.device)
        g = self._gradients[order][:, order]
        level = g.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        g = g / level + ROW_DAMPING * torch.eye(len(g), dtype=torch.float64, device=g.device)
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(g))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor

    def codes_of_widths(self, weight: Tensor, widths: Sequence[int], sweeps: int = 1) -> list[TrellisMatrix]:
        """``codes`` for several numbers of bits, on as many threads as torch uses; on a GPU, all at once."""
        return self._for_widths(weight.device, widths, lambda bits: self.codes(weight, bits, sweeps))

    def codes(self, weight: Tensor, bits: int, sweeps: int = 1) -> TrellisMatrix:
        """Trellis codes of a weight.

        Args:
            weight: W, ``(out_features, in_features)``.
            bits: k.
            sweeps: times that all columns are coded again.
        """
        target = self.target(weight)
        _, place, _, bounds = stream(len(target))
        base = _base(target)
        parts = []
        for start, stop in pairwise(bounds):
            block = self._block(target, start, stop, bits, base)
            block.round()
            for _ in range(sweeps):
                block.refit()
                block.descend()
            parts.append(block)
            error = target[start:stop] - block.values()
            target[stop:] -= self.feedback(start, stop).T @ error
        scale = np.concatenate([block.scale_codes for block in parts])[place]
        found = TrellisMatrix(
            torch.cat([block.codes() for block in parts], dim=1).cpu(),
            torch.from_numpy(scale),
            torch.tensor([base], dtype=torch.float32),
            torch.tensor([stored_seed(self.seed, weight.shape[1], self.width)], dtype=torch.int32),
            bits,
        )
        return found.to(weight.device)

    def first_cycle_errors(self, weight: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """What one pass of codes adds to the first cycle's rows of ``target``, ``(rows, in_features)`` float64."""
        target = self.target(weight)
        stop, base = stream(len(target)).bounds[1], _base(target)

        def error(bits: int) -> Tensor:
            block = self._block(target, 0, stop, bits, base)
            block.round()
            return block.values() - target[:stop]

        return self._for_widths(weight.device, widths, error)

    def target(self, weight: Tensor) -> Tensor:
        """The rotated weight, its rows in the order of the stream, ``(out_features, in_features)`` float64."""
        wide = weight.double()
        wide = wide if self.seed is None else rotate(wide, self.seed, self.width)
        return wide[torch.from_numpy(stream(len(wide)).order).to(wide.device)]

    def feedback(self, start: int, stop: int) -> Tensor:
        """``U_bb⁻¹ U_b,later`` of the cycle of these rows, ``(rows, later rows)`` float64."""
        own = self.row_factor[start:stop, start:stop]
        found: Tensor = torch.linalg.solve_triangular(own, self.row_factor[start:stop, stop:], upper=True)
        return found

    def _block(self, target: Tensor, start: int, stop: int, bits: int, base: float) -> _Block:
        own = self.row_factor[start:stop, start:stop]
        remaining = torch.cholesky_inverse(own, upper=True).diagonal()  # of (UᵀU)⁻¹
        return _Block(target[start:stop], self.hessian, remaining, bits, base)

    def _for_widths(self, device: torch.device, widths: Sequence[int], made: Callable[[int], T]) -> list[T]:
        # Computed once, before the threads start; the loops over states release the GIL.
        self.hessian.shares, self.hessian.single, self.row_factor  # noqa: B018
        threads = min(len(widths), torch.get_num_threads())
        if device.type == "cuda":
            threads = len(widths)
            torch.cuda.current_stream(device).synchronize()  # the threads' streams read what it has written

        def one(bits: int) -> T:
            with _own_stream(device):
                return made(bits)

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, widths))


class _Block:
    """The rows of one cycle of the stream. What the functions of ``mlorq.fitting.viterbi`` take is on their device, and
    transposed: a column is contiguous.
    """

    def __init__(self, target: Tensor, hessian: RowHessian, weights: Tensor, bits: int, base: float) -> None:
        self.functions = tensor_functions(target.device, bits)
        device = self.functions.device
        self.target = target
        self.hessian = hessian
        self.order = hessian.order.to(device)
        self.row_weights = weights.to(device)
        self.bits = bits
        self.base = base
        self.table = torch.from_numpy(tables()[bits - 1].copy()).to(device)
        self.scale_codes = nearest_scale_codes(target.square().mean(1).sqrt().cpu().numpy(), base)
        rows, columns = target.shape
        self._states = torch.empty((columns, rows), dtype=torch.int16, device=device)  # columns in the Hessian's order
        self._coded = torch.empty((columns, rows), device=device)

    def codes(self) -> Tensor:
        """The k new bits of every state, ``(columns, rows)`` uint8."""
        found: Tensor = (self._states & (2**self.bits - 1)).to(torch.uint8)[self.order.argsort()]
        return found

    @property
    def scales(self) -> Tensor:
        """The scales of the rows, ``(rows,)`` float64."""
        found = torch.from_numpy(scale_values()[self.scale_codes] * np.float32(self.base))
        return found.double().to(self.functions.device)

    def values(self) -> Tensor:
        """The coded values with scales, ``(rows, columns)`` float64, on the target's device."""
        return self._unit() * self.scales.to(self.target.device).unsqueeze(1)

    def round(self) -> None:
        """Code all columns, with feedback."""
        target = self._scaled_target()
        errors = torch.empty_like(target[:BLOCK])
        for part, shares in parts(self.hessian.shares.to(self.functions.device)):
            left, columns = target[part], len(shares)
            for start in range(0, columns, BLOCK):
                stop = min(start + BLOCK, columns)
                own, lost = shares[start:stop, start:stop].contiguous(), errors[: stop - start]
                place = slice(part.start + start, part.start + stop)
                self._code(self.functions.round_block, left[start:stop], own, place, lost)
                left[stop:].addmm_(shares[start:stop, stop:].T, lost, alpha=-1)

    def descend(self) -> None:
        """Code all columns again, each given all others."""
        ordered = self.hessian.in_order(self.hessian.single.to(self.functions.device)).contiguous()
        errors = self._coded - self._scaled_target()
        moves = torch.empty_like(errors[:BLOCK])
        for part, h in parts(ordered):
            slope, columns = h @ errors[part], len(h)
            for start in range(0, columns, BLOCK):
                stop = min(start + BLOCK, columns)
                own, moved = h[start:stop, start:stop].contiguous(), moves[: stop - start]
                place = slice(part.start + start, part.start + stop)
                self._code(self.functions.descend_block, slope[start:stop], own, place, moved)
                slope[stop:].addmm_(h[stop:, start:stop], moved)

    def _code(self, block: TensorBlock, values: Tensor, matrix: Tensor, part: slice, results: Tensor) -> None:
        weights, states, coded = self._error_weights(), self._states[part], self._coded[part]
        block(values, matrix, weights, self.table, self.bits, states, coded, results)

    def refit(self) -> None:
        """Least-squares scales, ``(v H wᵀ) / (v H vᵀ)`` per row; rows without a positive one keep theirs."""
        unit = self._unit()
        weighted = multiply(unit, self.hessian.matrix)
        power = (weighted * unit).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        fitted = ((weighted * self.target).sum(1) / power).cpu().numpy()
        usable = np.isfinite(fitted) & (fitted > 0) & (self.scale_codes != ZERO_SCALE)
        found = nearest_scale_codes(np.where(usable, fitted, 0.0), self.base)
        self.scale_codes = np.where(usable, found, self.scale_codes)

    def _unit(self) -> Tensor:
        unit = torch.empty_like(self._coded, dtype=torch.float64)
        unit[self.order] = self._coded.double()
        return unit.T.to(self.target.device)

    def _scaled_target(self) -> Tensor:
        """The target in units of the scales, ``(columns, rows)`` float32, columns in the order of the Hessian."""
        scales = self.scales
        inverse = torch.where(scales > 0, 1 / scales, 0.0)
        return (self.target.to(scales.device) * inverse.unsqueeze(1)).T[self.order].float().contiguous()

    def _error_weights(self) -> Tensor:
        """Weights of squared errors in units of the scales, mean 1, ``(rows,)`` float32."""
        found = self.scales.square() * self.row_weights
        mean = float(found.mean())
        return (found / mean if mean > 0 else torch.ones_like(found)).float()


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU: a stream for this thread's kernels, which run beside those of others."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _base(target: Tensor) -> float:
    """The scale of code 0, a float32 value: ``HEADROOM`` times the largest root mean square of a row."""
    largest = HEADROOM * float(target.square().mean(1).max().sqrt()) if target.numel() else 0.0
    return float(np.float32(min(max(largest, 1e-30), LARGEST_BASE)))
