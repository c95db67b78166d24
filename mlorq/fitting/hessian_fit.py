"""The paper's fit of a layer: weighted SVD, nearest rounding, costs under the label-free Hessian (METHOD 1, 4).

``HessianFit`` (MLoRQ, arXiv 2507.09616) holds what all candidates of one layer share: weighted factors, and one
quantizer per bit-width for W, A and B. Local costs of all ranks come from Gram matrices: with
``D_h = diag(h)``, ``h_i = max_j H_ij``,

    m n Δ_r = ‖W‖²_h - 2 Σ_{k≤r} p_k + Σ_{k,l≤r} P_kl,
    p_k = a_kᵀ D_h W b_kᵀ,   P = (Âᵀ D_h Â) ∘ (B̂ B̂ᵀ),

and the leading-submatrix sums of P grow by ``P_rr + 2 Σ_{k<r} P_kr``. A pair of bit-widths costs an element-wise
product and a cumulative sum, instead of ``m · r · n`` multiply-adds for each rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mlorq.calibration.blocks import of_diagonal
from mlorq.codecs.affine import Rounded, RowQuantizer, storage_for
from mlorq.codecs.base import ZeroPoint
from mlorq.codecs.trellis import TrellisMatrix
from mlorq.fitting.base import Sum
from mlorq.fitting.gram import leading_errors
from mlorq.fitting.scale_search import CHUNK_ELEMENTS, row_ranges, search_left_factor, search_quantizer
from mlorq.fitting.settings import FitSettings
from mlorq.fitting.trellis import TrellisFit
from mlorq.fitting.weighted_svd import Factors, weighted_svd
from mlorq.memory import WIDEST, block_width


class HessianFit:
    """Candidates of one layer under its label-free Hessian; a ``LayerFit``.

    Args:
        weight: W, ``(out_features, in_features)``.
        hessian: label-free Hessian of W, same shape.
        settings: percentiles, zero-points and the split of the singular values.
        zero_point: storage of zero-points and scales; None: as the settings say, with float32 scales if W needs them.
    """

    held_out = False

    def __init__(
        self, weight: Tensor, hessian: Tensor, settings: FitSettings, zero_point: ZeroPoint | None = None
    ) -> None:
        self.weight = weight.to(torch.float32)
        self.hessian = hessian.to(torch.float32)
        self.settings = settings
        self.percentiles: Sequence[float] = settings.percentiles
        self.zero_point: ZeroPoint = zero_point or storage_for(weight, settings.zero_point)
        self._quantizers: dict[tuple[str, int], RowQuantizer] = {}
        self._residuals: dict[int, HessianFit] = {}

    @cached_property
    def factors(self) -> Factors:
        """The weighted SVD, computed on first use: quantize-only layers never need it."""
        return weighted_svd(self.weight, self.hessian, self.settings.factor_split)

    @cached_property
    def row_weights(self) -> Tensor:
        """``h_i = max_j H_ij``, ``(out_features,)`` float64."""
        return self.hessian.amax(1).to(torch.float64)

    def output_metric(self) -> Tensor | None:
        """The diagonal matrix of H's row sums plus a small ridge, ``(out_features, out_features)`` float64.

        None, which is the identity, for a layer with too many outputs for such a matrix (``mlorq.memory.WIDEST``).
        """
        if len(self.hessian) > WIDEST:
            return None
        rows = self.hessian.sum(1).to(torch.float64)
        return torch.diag(rows + max(1e-3 * float(rows.mean()), torch.finfo(torch.float64).tiny))

    def of(self, weight: Tensor) -> HessianFit:
        return HessianFit(weight, self.hessian, self.settings, self.zero_point)

    # -- quantizers -----------------------------------------------------------------------------------------

    @cached_property
    def _weight_ranges(self) -> tuple[Tensor, Tensor]:
        return row_ranges(self.weight, self.percentiles)

    @cached_property
    def _right_ranges(self) -> tuple[Tensor, Tensor]:
        return row_ranges(self.factors.b, self.percentiles)

    def weight_quantizer(self, bits: int) -> RowQuantizer:
        """Quantizer of W's rows, errors weighted by H."""
        return self._cached(
            ("weight", bits),
            lambda: search_quantizer(
                self.weight,
                bits,
                self.percentiles,
                weights=self.hessian,
                zero_point=self.zero_point,
                ranges=self._weight_ranges,
            ),
        )

    def right_quantizer(self, bits: int) -> RowQuantizer:
        """Quantizer of B's rows; rows do not depend on the rank, so one quantizer serves all ranks."""
        return self._cached(
            ("b", bits),
            lambda: search_quantizer(
                self.factors.b, bits, self.percentiles, zero_point=self.zero_point, ranges=self._right_ranges
            ),
        )

    def left_quantizer(self, bits: int, rank: int | None = None) -> RowQuantizer:
        """Quantizer of A's rows by the error after multiplication by B, at one rank; None: full rank, for all."""
        rank = rank or self.factors.a.shape[1]
        return self._cached(
            (f"a{rank}", bits),
            lambda: search_left_factor(
                self.factors.a[:, :rank],
                self.factors.b[:rank],
                self.weight,
                bits,
                self.percentiles,
                weights=self.hessian,
                zero_point=self.zero_point,
            ),
        )

    def _cached(self, key: tuple[str, int], search: Callable[[], RowQuantizer]) -> RowQuantizer:
        if key not in self._quantizers:
            self._quantizers[key] = search()
        return self._quantizers[key]

    # -- matrices -------------------------------------------------------------------------------------------

    def codes(self, bits: int) -> Rounded:
        return Rounded.nearest(self.weight, self.weight_quantizer(bits))

    @cached_property
    def _trellis(self) -> TrellisFit:
        columns = self.hessian.mean(0).to(torch.float64)
        columns = columns + max(1e-3 * float(columns.mean()), torch.finfo(torch.float64).tiny)
        rows = self.output_metric()
        assert rows is not None  # the form does not serve wider layers
        return TrellisFit(of_diagonal(columns, block_width(len(columns))), rows, self.settings.rotation)

    def trellis(self, widths: Sequence[int], sweeps: int = 1) -> list[TrellisMatrix]:
        """Trellis codes, errors weighted by H's mean over rows and its mean over columns."""
        return self._trellis.codes_of_widths(self.weight, widths, sweeps)

    def product(self, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        """Leading columns of A and rows of B; scales of A are searched at this rank (METHOD 4)."""
        left, right = self.left_quantizer(bits_a, rank), self.right_quantizer(bits_b).leading(rank)
        a, b = self.factors.a[:, :rank].float(), self.factors.b[:rank].float()
        return {"a": Rounded.nearest(a, left), "b": Rounded.nearest(b, right)}

    def factors_at(self, ranks: Sequence[int], bits_a: int, bits_b: int) -> tuple[list[Tensor], Tensor]:
        """Those of ``product``."""
        a = self.factors.a.to(torch.float32)
        lefts = [self.left_quantizer(bits_a, rank).round_trip(a[:, :rank]) for rank in ranks]
        return lefts, self._right_values(bits_b)[: ranks[-1]]

    def _right_values(self, bits: int) -> Tensor:
        """All rows of B after nearest rounding."""
        return self.right_quantizer(bits).round_trip(self.factors.b.to(torch.float32))

    def codes_and_product(self, bits: int, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        """Factors of the residual of nearest rounding, and then codes of W minus their product."""
        quantizer = self.weight_quantizer(bits)
        if bits not in self._residuals:
            self._residuals[bits] = self.of(self.weight - quantizer.round_trip(self.weight))
        factors = self._residuals[bits].product(rank, bits_a, bits_b)
        left = self.weight - factors["a"].dequantize() @ factors["b"].dequantize()
        return {"weight": Rounded.nearest(left, quantizer), **factors}

    # -- costs ----------------------------------------------------------------------------------------------

    def cost(self, dense: Tensor) -> float:
        """``Δ = mean_ij h_i (W - Ŵ)²_ij`` (METHOD 4)."""
        errors = torch.cat(
            [
                (own - weight).to(torch.float64).square_().sum(1)
                for own, weight in zip(dense.split(self._chunk), self.weight.split(self._chunk), strict=True)
            ]
        )
        return float((errors * self.row_weights).sum() / self.weight.numel())

    @property
    def _chunk(self) -> int:
        """Rows whose float64 errors are held at once: a head of a language model has 10⁸ weights."""
        return max(1, CHUNK_ELEMENTS // self.weight.shape[1])

    def trellis_costs(self, widths: Sequence[int]) -> list[float]:
        return [self.cost(matrix.dequantize()) for matrix in self.trellis(widths, sweeps=0)]

    def float_product_costs(self) -> None:
        """Nearest rounding is little work: all ranks have their costs (METHOD 4)."""

    def product_costs(self, widths: Sequence[int], rank: int | None = None) -> dict[tuple[int, int], np.ndarray]:
        a = {bits: self.left_quantizer(bits).round_trip(self.factors.a.to(torch.float32)) for bits in widths}
        b = {bits: self._right_values(bits) for bits in widths}
        return {pair: costs[:rank] for pair, costs in gram_costs(self.weight, self.row_weights, a, b).items()}

    def sum_costs(self, wanted: Sequence[Sum]) -> list[float]:
        costs = []
        for one in wanted:
            values = {name: part.dequantize() for name, part in self.codes_and_product(*one).items()}
            costs.append(self.cost(values["weight"] + values["a"] @ values["b"]))
        return costs


def gram_costs(
    weight: Tensor, row_weights: Tensor, left: dict[int, Tensor], right: dict[int, Tensor]
) -> dict[tuple[int, int], np.ndarray]:
    """Weighted mean squared errors of all leading products ``Â_r B̂_r``, by Gram matrices in float64 (METHOD 4).

    Args:
        weight: W, ``(out_features, in_features)``.
        row_weights: h, ``(out_features,)``.
        left: ``{bits_a: Â (out_features, rank)}``.
        right: ``{bits_b: B̂ (rank, in_features)}``.

    Returns:
        ``{(bits_a, bits_b): (rank,) float64}``: ``Δ_r = mean_ij h_i (W - Â_r B̂_r)²_ij`` at entry ``r - 1``.
    """
    w = weight.to(torch.float64)
    h = row_weights.to(torch.float64).unsqueeze(1)
    total = (h * w.square()).sum()
    gram_a, projected = {}, {}
    for bits, values in left.items():
        a = values.to(torch.float64)
        weighted = (h * a).T
        gram_a[bits] = weighted @ a
        projected[bits] = weighted @ w
    gram_b = {}
    wide_b = {bits: values.to(torch.float64) for bits, values in right.items()}
    for bits, b in wide_b.items():
        gram_b[bits] = b @ b.T
    costs = {}
    for bits_a in left:
        for bits_b in right:
            error = leading_errors(total, projected[bits_a], wide_b[bits_b], gram_a[bits_a], gram_b[bits_b])
            costs[bits_a, bits_b] = (error / w.numel()).cpu().numpy()
    return costs
