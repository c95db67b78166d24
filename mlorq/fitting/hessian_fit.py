"""Intra-layer search: every candidate of a layer, its local cost and its memory (METHOD 1, 2, 4).

``LayerSearch`` holds what all candidates of one layer share: weighted factors, and one quantizer a bit-width for W,
A and B. Local costs of all ranks come from Gram matrices: with ``D_h = diag(h)``, ``h_i = max_j H_ij``,

    m n Δ_r = ‖W‖²_h - 2 Σ_{k≤r} p_k + Σ_{k,l≤r} P_kl,
    p_k = a_kᵀ D_h W b_kᵀ,   P = (Âᵀ D_h Â) ∘ (B̂ B̂ᵀ),

and the leading-submatrix sums of P grow by ``P_rr + 2 Σ_{k<r} P_kr``. A bit pair costs an element-wise product and a
cumulative sum, where the product of every rank would cost ``m · r · n`` each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mlorq.artifacts.schemas import CANDIDATES
from mlorq.codecs.affine import (
    Rounded,
    RowQuantizer,
    ZeroPoint,
    row_ranges,
    search_left_factor,
    search_quantizer,
    store_matrix,
)
from mlorq.costs.pareto import pareto_front
from mlorq.fitting.gram import leading_errors
from mlorq.fitting.weighted_svd import Factors, Split, weighted_svd
from mlorq.forms.base import Candidate, CompressedLayer, Form, combine
from mlorq.forms.memory import Accounting, candidate_bytes, low_rank_bytes

SMALLEST_RANK = 2
SearchMetric = Literal["hessian", "moments"]


@dataclass(frozen=True)
class CandidateSettings:
    """What decides the candidates of a layer; the fields mean what they mean in ``SearchConfig``."""

    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    factor_bits: tuple[int, ...] = (4, 6, 8)
    rank_multiple: int = 1
    factor_split: Split = "U_SV"
    zero_point: ZeroPoint = "codes"
    percentiles: tuple[float, ...] = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9999, 1.0)
    accounting: Accounting = "exact"
    metric: SearchMetric = "hessian"
    forms: tuple[Form, ...] = ("Q", "LR")
    sum_bits: tuple[int, ...] = (2, 3, 4)
    sum_factor_bits: tuple[int, ...] = (4,)
    sum_ranks: tuple[int, ...] = (4, 8, 16, 32)


class LayerSearch:
    """The candidates of one layer.

    Args:
        weight: W, ``(out_features, in_features)``.
        hessian: label-free Hessian of W, same shape.
        settings: bit-widths, percentiles and accounting.
        groups: convolution groups; more than one leaves quantize-only candidates.
    """

    is_fitted = False  # to the calibration data's first fold

    def __init__(self, weight: Tensor, hessian: Tensor, settings: CandidateSettings, groups: int = 1) -> None:
        self.weight = weight.to(torch.float32)
        self.hessian = hessian.to(torch.float32)
        self.settings = settings
        self.groups = groups
        self._quantizers: dict[tuple[str, int], RowQuantizer] = {}

    @cached_property
    def factors(self) -> Factors:
        """The weighted SVD; computed on first use, since quantize-only layers never need it."""
        return weighted_svd(self.weight, self.hessian, self.settings.factor_split)

    @cached_property
    def row_weights(self) -> Tensor:
        """``h_i = max_j H_ij``, ``(out_features,)`` float64."""
        return self.hessian.amax(1).to(torch.float64)

    def output_metric(self) -> Tensor:
        """G for closed forms, ``(out_features, out_features)`` float64: here the rows' sums of H alone."""
        rows = self.hessian.sum(1).to(torch.float64)
        return torch.diag(rows + max(1e-3 * float(rows.mean()), torch.finfo(torch.float64).tiny))

    # -- quantizers -----------------------------------------------------------------------------------------

    @cached_property
    def _weight_ranges(self) -> tuple[Tensor, Tensor]:
        return row_ranges(self.weight, self.settings.percentiles)

    @cached_property
    def _right_ranges(self) -> tuple[Tensor, Tensor]:
        return row_ranges(self.factors.b, self.settings.percentiles)

    def weight_quantizer(self, bits: int) -> RowQuantizer:
        """Quantizer of W's rows, errors weighted by H."""
        return self._cached(
            ("weight", bits),
            lambda: search_quantizer(
                self.weight,
                bits,
                self.settings.percentiles,
                weights=self.hessian,
                zero_point=self.settings.zero_point,
                ranges=self._weight_ranges,
            ),
        )

    def right_quantizer(self, bits: int) -> RowQuantizer:
        """Quantizer of B's rows; a row's does not depend on the rank, so one serves all ranks."""
        return self._cached(
            ("b", bits),
            lambda: search_quantizer(
                self.factors.b,
                bits,
                self.settings.percentiles,
                zero_point=self.settings.zero_point,
                ranges=self._right_ranges,
            ),
        )

    def left_quantizer(self, bits: int, rank: int | None = None) -> RowQuantizer:
        """Quantizer of A's rows, judged after multiplication by B: once for all ranks, or at one rank."""
        rank = rank or self.factors.a.shape[1]

        def search() -> RowQuantizer:
            return search_left_factor(
                self.factors.a[:, :rank],
                self.factors.b[:rank],
                self.weight,
                bits,
                self.settings.percentiles,
                weights=self.hessian,
                zero_point=self.settings.zero_point,
            )

        return self._cached((f"a{rank}", bits), search)

    def _cached(self, key: tuple[str, int], search: object) -> RowQuantizer:
        if key not in self._quantizers:
            self._quantizers[key] = search()  # type: ignore[operator]
        return self._quantizers[key]

    # -- candidates -----------------------------------------------------------------------------------------

    def ranks(self, bits_a: int, bits_b: int) -> np.ndarray:
        """Ranks whose memory lies below the largest ``Q`` candidate's, ``(ranks,)`` int64, rising."""
        rows, columns = self.weight.shape
        settings = self.settings
        step = settings.rank_multiple
        first = max(step, SMALLEST_RANK)
        ranks = np.arange(first, min(rows, columns) + 1, step, dtype=np.int64)
        largest = candidate_bytes(
            Candidate("Q", bits=max(settings.bits)), rows, columns, settings.accounting, settings.zero_point
        )
        return ranks[self._low_rank_bytes(ranks, bits_a, bits_b) < largest]

    def _low_rank_bytes(self, ranks: np.ndarray, bits_a: int, bits_b: int) -> np.ndarray:
        rows, columns = self.weight.shape
        return low_rank_bytes(ranks, bits_a, bits_b, rows, columns, self.settings.accounting, self.settings.zero_point)

    def quantized_cost(self, bits: int) -> float:
        """Local cost ``mean_ij h_i (W - Ŵ)²_ij`` of ``Q(bits)``."""
        error = (self.weight_quantizer(bits).round_trip(self.weight) - self.weight).to(torch.float64)
        return float((error.square().sum(1) * self.row_weights).sum() / self.weight.numel())

    def low_rank_costs(self) -> dict[tuple[int, int], np.ndarray]:
        """Local cost of every rank, for every bit pair.

        Returns:
            ``{(bits_a, bits_b): (full rank,) float64}``; entry ``r - 1`` belongs to rank r.
        """
        bits = self.settings.factor_bits
        a = {width: self._left_values(width) for width in bits}
        b = {width: self._right_values(width) for width in bits}
        return gram_costs(self.weight, self.row_weights, a, b)

    def sum_candidates(self) -> list[Candidate]:
        """The candidates ``QLR``: none where a layer has no factors, and none that is larger than the largest ``Q``."""
        rows, columns = self.weight.shape
        settings = self.settings
        if self.groups != 1 or "QLR" not in settings.forms:
            return []

        def size(candidate: Candidate) -> int:
            return candidate_bytes(candidate, rows, columns, settings.accounting, settings.zero_point)

        largest = size(Candidate("Q", bits=max(settings.bits)))
        found = [
            Candidate("QLR", bits=bits, bits_a=width, bits_b=width, rank=rank)
            for bits in settings.sum_bits
            for width in settings.sum_factor_bits
            for rank in settings.sum_ranks
            if SMALLEST_RANK <= rank <= min(rows, columns)
        ]
        return [candidate for candidate in found if size(candidate) < largest]

    def sum_costs(self) -> dict[Candidate, float]:
        """Local cost of every ``QLR`` candidate."""
        found = {}
        for candidate in self.sum_candidates():
            error = (self.dense(candidate) - self.weight).to(torch.float64)
            found[candidate] = float((error.square().sum(1) * self.row_weights).sum() / self.weight.numel())
        return found

    def _left_values(self, bits: int) -> Tensor:
        return self.left_quantizer(bits).round_trip(self.factors.a.to(torch.float32))

    def _right_values(self, bits: int) -> Tensor:
        return self.right_quantizer(bits).round_trip(self.factors.b.to(torch.float32))

    def table(self) -> pa.Table:
        """All candidates with memory, local cost and front membership (``tables.CANDIDATES``).

        ``Q`` candidates are always on the front: they are measured in any case.
        """
        rows, columns = self.weight.shape
        settings = self.settings
        candidates: list[Candidate] = [Candidate("Q", bits=bits) for bits in settings.bits]
        sizes = [
            candidate_bytes(candidate, rows, columns, settings.accounting, settings.zero_point)
            for candidate in candidates
        ]
        costs = [self.quantized_cost(bits) for bits in settings.bits]
        if self.groups == 1 and settings.factor_bits and "LR" in settings.forms:
            all_costs = self.low_rank_costs()
            for (bits_a, bits_b), cost in all_costs.items():
                ranks = self.ranks(bits_a, bits_b)
                candidates += [Candidate("LR", bits_a=bits_a, bits_b=bits_b, rank=int(r)) for r in ranks]
                sizes += self._low_rank_bytes(ranks, bits_a, bits_b).tolist()
                costs += cost[ranks - 1].tolist()
        for candidate, value in self.sum_costs().items():
            candidates.append(candidate)
            sizes.append(candidate_bytes(candidate, rows, columns, settings.accounting, settings.zero_point))
            costs.append(value)
        front = pareto_front(np.array(costs), np.array(sizes))
        front[: len(settings.bits)] = True
        return pa.table(
            {
                "candidate_id": [candidate.candidate_id for candidate in candidates],
                "form": [candidate.form for candidate in candidates],
                "bits": [candidate.bits for candidate in candidates],
                "bits_a": [candidate.bits_a for candidate in candidates],
                "bits_b": [candidate.bits_b for candidate in candidates],
                "rank": [candidate.rank for candidate in candidates],
                "bytes": sizes,
                "local_cost": costs,
                "on_front": front,
            },
            schema=CANDIDATES,
        )

    # -- realisation ----------------------------------------------------------------------------------------

    def quantized_parts(self, candidate: Candidate) -> dict[str, tuple[Tensor, RowQuantizer]]:
        """The matrices a candidate stores, before rounding, with their quantizers.

        ``{"weight": (W, quantizer)}`` or ``{"a": (A_r, …), "b": (B_r, …)}``, float32; for ``QLR`` both, the factors
        those of what nearest rounding leaves of W. Scales of A are searched at the candidate's own rank (METHOD 4).
        """
        parts: dict[str, tuple[Tensor, RowQuantizer]] = {}
        search = self
        if candidate.bits is not None:
            quantizer = self.weight_quantizer(candidate.bits)
            parts["weight"] = (self.weight, quantizer)
            if candidate.has_product:
                remainder = self.weight - quantizer.round_trip(self.weight)
                search = LayerSearch(remainder, self.hessian, self.settings, self.groups)
        if candidate.has_product:
            rank, bits_a, bits_b = candidate.rank, candidate.bits_a, candidate.bits_b
            assert rank and bits_a and bits_b, candidate  # noqa: PT018
            right = search.right_quantizer(bits_b)
            leading = RowQuantizer(right.scale[:rank], right.zero_point[:rank], right.bits)
            parts["a"] = (search.factors.a[:, :rank].float(), search.left_quantizer(bits_a, rank))
            parts["b"] = (search.factors.b[:rank].float(), leading)
            if candidate.bits is not None:
                # What the codes stand for, now that the product is there.
                a, b = (parts[name][1].round_trip(parts[name][0]) for name in ("a", "b"))
                parts["weight"] = (self.weight - a @ b, parts["weight"][1])
        return parts

    def rounded_parts(self, candidate: Candidate) -> dict[str, Rounded]:
        """Codes and quantizers of the matrices that a candidate stores, as the search judges them."""
        parts = self.quantized_parts(candidate)
        return {
            name: Rounded(quantizer.quantize(values), quantizer, values) for name, (values, quantizer) in parts.items()
        }

    def dense(self, candidate: Candidate) -> Tensor:
        """Ŵ of a candidate as the search judges it, ``(out_features, in_features)`` float32."""
        parts = self.rounded_parts(candidate)
        return combine({name: part.dequantize() for name, part in parts.items()})

    def realise(self, layer: str, candidate: Candidate) -> CompressedLayer:
        """The stored form of a candidate by nearest rounding."""
        parts = LayerSearch.rounded_parts(self, candidate)
        return stored(layer, candidate, parts, self.settings.zero_point)


def stored(layer: str, candidate: Candidate, parts: Mapping[str, Rounded], zero_point: ZeroPoint) -> CompressedLayer:
    """The stored form of a candidate's matrices."""
    matrices = {name: store_matrix(part.codes, part.quantizer, zero_point) for name, part in parts.items()}
    return CompressedLayer(layer, candidate, matrices)


def gram_costs(
    weight: Tensor, row_weights: Tensor, left: dict[int, Tensor], right: dict[int, Tensor]
) -> dict[tuple[int, int], np.ndarray]:
    """Weighted mean squared errors of all leading products ``Â_r B̂_r``, by Gram matrices in float64.

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


def candidate_of(row: dict[str, object]) -> Candidate:
    """The candidate of a table row."""
    return Candidate(
        form=row["form"],  # type: ignore[arg-type]
        bits=row["bits"],  # type: ignore[arg-type]
        bits_a=row["bits_a"],  # type: ignore[arg-type]
        bits_b=row["bits_b"],  # type: ignore[arg-type]
        rank=row["rank"],  # type: ignore[arg-type]
    )


def spread(count: int, points: int) -> Sequence[int]:
    """At most ``points`` indices spread evenly over ``0 … count - 1``, both ends included."""
    if count <= points:
        return range(count)
    return sorted(set(np.round(np.linspace(0, count - 1, points)).astype(int).tolist()))
