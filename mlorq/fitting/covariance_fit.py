"""Closed-form fits of matrices under the covariances of inputs and output gradients (METHOD 7).

With ``Σ = E[x xᵀ]`` and G the second moment of the output gradients, the output's error is about
``c · tr(G ΔW Σ ΔWᵀ)``.

- Codes: scales by search, GPTQ with Hessian Σ, then alternately least-squares scales and coordinate descent of codes.
- A product: with Cholesky factors ``L_G L_Gᵀ = G``, ``L_Σ L_Σᵀ = Σ`` and ``L_Gᵀ W L_Σ = U S Vᵀ``, the factors
  ``A = L_G⁻ᵀ U S^½`` and ``B = S^½ Vᵀ L_Σ⁻¹`` are optimal at every rank. Since ``AᵀGA`` is diagonal, the rows of B are
  independent problems, all with Hessian Σ: one B̂ serves every rank. Then ``A* = W Σ B̂ᵀ (B̂ Σ B̂ᵀ)⁻¹``, rounded with
  Hessian ``B̂ Σ B̂ᵀ``. (G = I gives SVD-LLM, arXiv 2403.07378; the refits follow CALDERA, arXiv 2405.18886.)
- Codes and a product: alternately codes of W minus the product, and the product for W minus the codes.
- Trellis codes: ``mlorq.fitting.trellis``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mlorq.calibration.blocks import diagonal, multiply, solve_lower
from mlorq.calibration.covariance import Moments, pooled
from mlorq.codecs.affine import Rounded, RowQuantizer, storage_for
from mlorq.codecs.base import ZeroPoint
from mlorq.codecs.trellis import TrellisMatrix
from mlorq.fitting.base import Sum
from mlorq.fitting.gptq import RowHessian, descend, gptq, refit_scale
from mlorq.fitting.gram import damped, leading_errors, principal_directions
from mlorq.fitting.scale_search import search_quantizer
from mlorq.fitting.settings import FitSettings
from mlorq.fitting.shared_hessian import shared_hessian
from mlorq.fitting.trellis import TrellisFit
from mlorq.fitting.trellis_costs import trellis_costs

SWEEPS = 2  # of coordinate descent after GPTQ; scales are refitted before each
TURNS = 2  # alternations of codes and product
RIDGE = 1e-6  # on normal matrices, relative to the mean diagonal


@dataclass(frozen=True)
class ProductFactors:
    """``W ≈ A_r B_r`` for every rank r: leading columns of A, leading rows of B.

    Attributes:
        a: ``(out_features, k)`` float64.
        b: ``(k, in_features)`` float64.
        singular_values: ``(k,)``, of ``L_Gᵀ W L_Σ``, in descending order.
    """

    a: Tensor
    b: Tensor
    singular_values: Tensor


class Metric:
    """Σ and G of a layer with their Cholesky factors.

    Args:
        inputs: Σ, ``(in_features, in_features)`` or its blocks (``calibration.blocks``), positive definite
            (``calibration.covariance.shrink``).
        gradients: G, ``(out_features, out_features)``, positive definite; None for the identity.
    """

    def __init__(self, inputs: Tensor, gradients: Tensor | None = None) -> None:
        self.inputs = inputs.double()
        self.gradients = None if gradients is None else gradients.double() / gradients.double().diagonal().mean()

    @cached_property
    def left(self) -> Tensor | None:
        """``L_G``, lower triangular; None for the identity."""
        return None if self.gradients is None else torch.linalg.cholesky(self.gradients)

    @cached_property
    def right(self) -> Tensor:
        """``L_Σ``, lower triangular, or its blocks."""
        found: Tensor = torch.linalg.cholesky(self.inputs)
        return found

    @cached_property
    def rows(self) -> RowHessian:
        """Σ as the shared Hessian of rows."""
        return shared_hessian(self.inputs)

    def cost(self, difference: Tensor) -> float:
        """``tr(G ΔW Σ ΔWᵀ)`` of a difference ``(out_features, in_features)``, float64."""
        wide = difference.double()
        weighted = multiply(wide, self.inputs)
        return float((weighted * (wide if self.gradients is None else self.gradients @ wide)).sum())

    def svd(self, weight: Tensor) -> ProductFactors:
        """Factors of W by the SVD of ``L_Gᵀ W L_Σ``.

        Args:
            weight: W, ``(out_features, in_features)``.
        """
        w = multiply(weight.double(), self.right)
        w = w if self.left is None else self.left.T @ w
        if w.shape[0] <= w.shape[1]:
            u = principal_directions(w @ w.T)
            sv = u.T @ w
            s = sv.norm(dim=1)
        else:
            v = principal_directions(w.T @ w)
            us = w @ v
            s = us.norm(dim=0)
            u, sv = us / s.clamp(min=torch.finfo(s.dtype).tiny), v.T * s.unsqueeze(1)
        root = s.sqrt().clamp(min=torch.finfo(s.dtype).tiny)
        a = u * root
        a = a if self.left is None else torch.linalg.solve_triangular(self.left.T, a, upper=True)
        b = solve_lower(sv / root.unsqueeze(1), self.right)
        # Only the product matters: factors of equal magnitude stay in the range of float16 scales.
        level = (b.square().mean() / a.square().mean().clamp(min=torch.finfo(s.dtype).tiny)).sqrt().sqrt()
        level = torch.where(level > 0, level, torch.ones_like(level))  # 0 if W is
        return ProductFactors(a * level, b / level, s)


class CovarianceFit:
    """Candidates of one layer in closed form under Σ and G; a ``LayerFit``.

    Args:
        weight: W, ``(out_features, in_features)``.
        metric: Σ and G of the fit.
        percentiles: upper percentiles p of the ranges (1-p, p) tried.
        zero_point: storage of zero-points and scales (``codecs.base.Storage``).
        rotation: seed of the rotation of trellis codes; None: no rotation.
        judge: Σ and G of held-out samples, for local costs; default: ``metric``.
        output: G of all samples, for ``output_metric``; default: that of ``metric``.
    """

    held_out = True

    def __init__(
        self,
        weight: Tensor,
        metric: Metric,
        percentiles: Sequence[float],
        zero_point: ZeroPoint = "codes",
        rotation: int | None = 0,
        *,
        judge: Metric | None = None,
        output: Callable[[], Tensor] | None = None,
    ) -> None:
        self.weight = weight.double()
        self.metric = metric
        self.percentiles = percentiles
        self.zero_point: ZeroPoint = zero_point
        self.rotation = rotation
        self.judge = judge or metric
        self._output = output
        self._right: dict[tuple[int, int, int], Rounded] = {}
        self._rounded: dict[int, Rounded] = {}

    @cached_property
    def factors(self) -> ProductFactors:
        """Factors of W in the metric."""
        return self.metric.svd(self.weight)

    def output_metric(self) -> Tensor:
        return self._output() if self._output is not None else self._gradients(self.metric)

    def of(self, weight: Tensor) -> CovarianceFit:
        return CovarianceFit(
            weight, self.metric, self.percentiles, self.zero_point, self.rotation, judge=self.judge, output=self._output
        )

    # -- matrices -------------------------------------------------------------------------------------------

    def codes(self, bits: int) -> Rounded:
        if bits not in self._rounded:
            self._rounded[bits] = self.round_rows(self.weight, self.metric.rows, bits)
        return self._rounded[bits]

    @cached_property
    def _trellis(self) -> TrellisFit:
        return TrellisFit(self.metric.inputs, self._gradients(self.metric), self.rotation)

    def _gradients(self, metric: Metric) -> Tensor:
        """G of a metric, the identity if it has none."""
        if metric.gradients is not None:
            return metric.gradients
        return torch.eye(len(self.weight), dtype=torch.float64, device=self.weight.device)

    def trellis(self, widths: Sequence[int], sweeps: int = 1) -> list[TrellisMatrix]:
        return self._trellis.codes_of_widths(self.weight, widths, sweeps)

    def product(self, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        return self._with_left(self.weight, bits_a, self.right(bits_b, rank))

    def factors_at(self, ranks: Sequence[int], bits_a: int, bits_b: int) -> tuple[list[Tensor], Tensor]:
        """Factors that are rounded once, as for ``product_costs``."""
        a = self.left_at_all_ranks(bits_a, ranks[-1])
        return [a[:, :rank] for rank in ranks], self.right(bits_b, ranks[-1], sweeps=0).dequantize()

    def codes_and_product(self, bits: int, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        """Alternately codes of W minus the product and the product for W minus the codes; the best of ``TURNS``."""
        best: dict[str, Rounded] = {}
        least = float("inf")
        product = torch.zeros_like(self.weight)
        for turn in range(TURNS):
            left = self.weight - product
            quantized = self.codes(bits) if turn == 0 else self.round_rows(left, self.metric.rows, bits)
            residual = self.weight - quantized.dequantize().double()
            b = self.round_rows(self.metric.svd(residual).b[:rank], self.metric.rows, bits_b)
            parts = {"weight": quantized, **self._with_left(residual, bits_a, b)}
            values = {name: part.dequantize().double() for name, part in parts.items()}
            product = values["a"] @ values["b"]
            cost = self.metric.cost(values["weight"] + product - self.weight)
            if cost < least:
                best, least = parts, cost
        return best

    def right(self, bits: int, rank: int, sweeps: int = SWEEPS) -> Rounded:
        """The leading rows of B̂, ``(rank, in_features)``; they do not depend on the rank."""
        key = bits, rank, sweeps
        if key not in self._right:
            self._right[key] = self.round_rows(self.factors.b[:rank], self.metric.rows, bits, sweeps)
        return self._right[key]

    def left_at_all_ranks(self, bits: int, rank: int) -> Tensor:
        """Leading columns of A after nearest rounding; they approximate those of Â when many ranks are compared."""
        a = self.factors.a[:, :rank]
        return self._search(a, None, bits).round_trip(a.float())

    def round_rows(self, values: Tensor, hessian: RowHessian, bits: int, sweeps: int = SWEEPS) -> Rounded:
        """Scales and codes of rows under one Hessian; never worse than nearest rounding with the searched scales."""
        quantizer = self._search(values, hessian, bits)
        norms = hessian.norms(values)
        codes = quantizer.quantize(values.float())
        fitted, least = refit_scale(values, hessian, quantizer, codes, norms)
        best = Rounded(codes, fitted, values.float())
        for sweep in range(sweeps + 1):
            if sweep:
                codes = descend(values, hessian, quantizer, codes)
            else:
                codes = gptq(values, hessian, quantizer)
            quantizer, errors = refit_scale(values, hessian, quantizer, codes, norms)
            better = errors < least
            least = torch.where(better, errors, least)
            kept = replace(quantizer, scale=torch.where(better, quantizer.scale, best.quantizer.scale))
            best = Rounded(torch.where(better.unsqueeze(1), codes, best.codes), kept, best.values)
        return best

    def _search(self, values: Tensor, hessian: RowHessian | None, bits: int) -> RowQuantizer:
        values = values.float()
        weights = None if hessian is None else diagonal(hessian.single).expand_as(values)
        return search_quantizer(values, bits, self.percentiles, weights=weights, zero_point=self.zero_point)

    def _with_left(self, target: Tensor, bits_a: int, right: Rounded) -> dict[str, Rounded]:
        """The rounded least-squares left factor for a rounded right factor."""
        b = right.dequantize().double()
        weighted = multiply(b, self.metric.inputs)
        gram = damped(weighted @ b.T, RIDGE)
        a = torch.cholesky_solve(weighted @ target.T, torch.linalg.cholesky(gram)).T
        return {"a": self.round_rows(a, RowHessian(gram), bits_a), "b": right}

    # -- costs ----------------------------------------------------------------------------------------------

    def cost(self, dense: Tensor) -> float:
        """``tr(G ΔW Σ ΔWᵀ)`` in the held-out metric, per token and entry of W."""
        return max(0.0, self.judge.cost(dense - self.weight.float())) / self.weight.numel()

    def trellis_costs(self, widths: Sequence[int]) -> list[float]:
        """Estimated from one cycle of rows (``mlorq.fitting.trellis_costs``)."""
        gradients = self._gradients(self.judge)
        costs = trellis_costs(self._trellis, self.weight, widths, self.judge.inputs, gradients)
        if costs is None:
            return [self.cost(codes.dequantize()) for codes in self.trellis(widths, sweeps=0)]
        return [max(0.0, cost) / self.weight.numel() for cost in costs]

    def float_product_costs(self) -> np.ndarray:
        found = product_costs(self.weight, self.judge, {0: self.factors.a}, {0: self.factors.b})[0, 0]
        return found.cpu().numpy() / self.weight.numel()

    def product_costs(self, widths: Sequence[int], rank: int | None = None) -> dict[tuple[int, int], np.ndarray]:
        """Costs of factors that are rounded once, without coordinate descent."""
        rank = len(self.factors.b) if rank is None else rank
        left = {bits: self.left_at_all_ranks(bits, rank) for bits in widths}
        right = {bits: self.right(bits, rank, sweeps=0).dequantize() for bits in widths}
        costs = product_costs(self.weight, self.judge, left, right)
        return {pair: cost.cpu().numpy() / self.weight.numel() for pair, cost in costs.items()}

    def sum_costs(self, wanted: Sequence[Sum]) -> list[float]:
        """All ranks of a bit-width cost one decomposition of W minus the codes."""
        costs = {}
        for bits in sorted({one[0] for one in wanted}):
            residual = self.of(self.weight.float() - self.codes(bits).dequantize())
            own = [one for one in wanted if one[0] == bits]
            widths = sorted({width for _, _, *pair in own for width in pair})
            by_pair = residual.product_costs(widths)
            for one in own:
                _, rank, bits_a, bits_b = one
                costs[one] = max(0.0, float(by_pair[bits_a, bits_b][rank - 1]))
        return [costs[one] for one in wanted]


def covariance_fit(weight: Tensor, folds: Sequence[Moments], settings: FitSettings) -> CovarianceFit:
    """The closed-form fit on the first fold, judged on the last one (METHOD 7).

    Args:
        weight: W, ``(out_features, in_features)``.
        folds: covariances of the layer's inputs and output gradients, one record per fold.
        settings: percentiles and zero-points.
    """
    last = folds[-1]
    return CovarianceFit(
        weight.float(),
        Metric(*folds[0].shrunk()),
        settings.percentiles,
        storage_for(weight, settings.zero_point),
        settings.rotation,
        # Σ is not shrunk: directions without variance cost nothing.
        judge=Metric(last.inputs, last.shrunk()[1]),
        output=lambda: pooled(folds).shrunk()[1],
    )


def product_costs(
    weight: Tensor, metric: Metric, left: dict[int, Tensor], right: dict[int, Tensor]
) -> dict[tuple[int, int], Tensor]:
    """``tr(G ΔW Σ ΔWᵀ)`` of all leading products ``Â_r B̂_r``, by Gram matrices in float64.

    As in METHOD 4, with ``p_k = a_kᵀ G W Σ b_kᵀ`` and ``P = (Âᵀ G Â) ∘ (B̂ Σ B̂ᵀ)``.

    Args:
        weight: W, ``(out_features, in_features)``.
        metric: Σ and G of held-out samples.
        left: ``{bits_a: Â (out_features, k)}``.
        right: ``{bits_b: B̂ (k, in_features)}``.

    Returns:
        ``{(bits_a, bits_b): (k,) float64}``: the cost of rank r at entry ``r - 1``.
    """
    w = weight.double()
    weighted = multiply(w, metric.inputs)  # W Σ
    total = metric.cost(w)
    gram_a, gram_b, projected, wide_b = {}, {}, {}, {}
    for bits, values in left.items():
        a = values.double()
        scaled = a.T if metric.gradients is None else a.T @ metric.gradients
        gram_a[bits] = scaled @ a
        projected[bits] = scaled @ weighted
    for bits, values in right.items():
        wide_b[bits] = values.double()
        gram_b[bits] = multiply(wide_b[bits], metric.inputs) @ wide_b[bits].T
    costs = {}
    for bits_a in left:
        for bits_b in right:
            costs[bits_a, bits_b] = leading_errors(
                total, projected[bits_a], wide_b[bits_b], gram_a[bits_a], gram_b[bits_b]
            )
    return costs
