"""The matrices of a candidate in the metric of the second moments, without any iteration over data (METHOD 7).

With ``Σ = E[x xᵀ]`` and G the second moment of the output's gradients, the output's error is about
``tr(G ΔW Σ ΔWᵀ)``.

- ``Q``: scales by search, GPTQ with Hessian Σ, then scales and codes in turn by least squares and coordinate descent.
- ``LR``: with Cholesky factors ``L_G L_Gᵀ = G``, ``L_Σ L_Σᵀ = Σ`` and ``L_Gᵀ W L_Σ = U S Vᵀ``, the factors
  ``A = L_G⁻ᵀ U S^½`` and ``B = S^½ Vᵀ L_Σ⁻¹`` are best at every rank. Since ``AᵀGA`` is diagonal the rows of B are
  problems of their own, all with Hessian Σ: one B̂ serves every rank. Then ``A* = W Σ B̂ᵀ (B̂ Σ B̂ᵀ)⁻¹``, rounded with
  Hessian ``B̂ Σ B̂ᵀ``. (With G = I it is SVD-LLM, arXiv 2403.07378; the refits are as in CALDERA, arXiv 2405.18886.)
- ``QLR``: ``Q`` of what the product leaves of W, and the product for what Q leaves of it, in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlorq.codecs.affine import Rounded, RowQuantizer, ZeroPoint, search_quantizer
from mlorq.fitting.gptq import RowHessian, descend, gptq, refit_scale
from mlorq.fitting.gram import leading_errors, principal_directions
from mlorq.forms.base import Candidate, combine

SWEEPS = 2  # of coordinate descent after GPTQ, scales refitted before each
TURNS = 2  # of Q and A B in ``QLR``
RIDGE = 1e-6  # of the mean diagonal, where a normal matrix is inverted


@dataclass(frozen=True)
class ProductFactors:
    """``W ≈ A_r B_r`` for every rank r: leading columns of A, leading rows of B.

    Attributes:
        a: ``(out_features, k)`` float64.
        b: ``(k, in_features)`` float64.
        singular_values: ``(k,)`` in the metric, falling.
    """

    a: Tensor
    b: Tensor
    singular_values: Tensor


class Metric:
    """Σ and G of a layer with their Cholesky factors.

    Args:
        inputs: Σ, ``(in_features, in_features)``, positive definite (``second_moments.shrink``).
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
        """``L_Σ``, lower triangular."""
        return torch.linalg.cholesky(self.inputs)

    @cached_property
    def rows(self) -> RowHessian:
        """Σ as the Hessian of rows."""
        return RowHessian(self.inputs)

    def cost(self, difference: Tensor) -> float:
        """``tr(G ΔW Σ ΔWᵀ)`` of a difference ``(out_features, in_features)``, float64."""
        wide = difference.double()
        weighted = wide @ self.inputs
        return float((weighted * (wide if self.gradients is None else self.gradients @ wide)).sum())

    def svd(self, weight: Tensor) -> ProductFactors:
        """The two-sided decomposition of W."""
        w = weight.double() @ self.right
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
        b = torch.linalg.solve_triangular(self.right, sv / root.unsqueeze(1), upper=False, left=False)
        # Only the product matters: both factors at the same magnitude stay in the range of float16 scales.
        level = (b.square().mean() / a.square().mean().clamp(min=torch.finfo(s.dtype).tiny)).sqrt().sqrt()
        return ProductFactors(a * level, b / level, s)


class ClosedForm:
    """Rounds the candidates of one layer in closed form.

    Args:
        weight: W, ``(out_features, in_features)``.
        metric: Σ and G.
        percentiles: upper percentiles of the ranges tried.
        zero_point: where zero-points may lie.
    """

    def __init__(
        self, weight: Tensor, metric: Metric, percentiles: Sequence[float], zero_point: ZeroPoint = "codes"
    ) -> None:
        self.weight = weight.double()
        self.metric = metric
        self.percentiles = percentiles
        self.zero_point: ZeroPoint = zero_point
        self._right: dict[int, Rounded] = {}
        self._rounded: dict[int, Rounded] = {}

    @cached_property
    def factors(self) -> ProductFactors:
        """The two-sided decomposition of W."""
        return self.metric.svd(self.weight)

    def rounded(self, candidate: Candidate) -> dict[str, Rounded]:
        """Codes and quantizers of the matrices that a candidate stores."""
        bits, rank, bits_a, bits_b = candidate.bits, candidate.rank, candidate.bits_a, candidate.bits_b
        if candidate.form == "Q":
            assert bits
            return {"weight": self.quantized(bits)}
        assert rank and bits_a and bits_b, candidate  # noqa: PT018
        if candidate.form == "LR":
            codes, quantizer, values = self.right(bits_b)
            leading = RowQuantizer(quantizer.scale[:rank], quantizer.zero_point[:rank], bits_b)
            return self._with_left(self.weight, bits_a, Rounded(codes[:rank], leading, values[:rank]))
        assert bits
        return self._with_product(bits, rank, bits_a, bits_b)

    def dense(self, candidate: Candidate) -> Tensor:
        """Ŵ of a candidate, ``(out_features, in_features)`` float32."""
        return combine({name: part.dequantize() for name, part in self.rounded(candidate).items()})

    def quantized(self, bits: int) -> Rounded:
        """W as codes."""
        if bits not in self._rounded:
            self._rounded[bits] = self.round_rows(self.weight, self.metric.rows, bits)
        return self._rounded[bits]

    def right(self, bits: int) -> Rounded:
        """B̂ for all ranks."""
        if bits not in self._right:
            self._right[bits] = self.round_rows(self.factors.b, self.metric.rows, bits)
        return self._right[bits]

    def left_at_all_ranks(self, bits: int) -> Tensor:
        """A rounded to nearest at full rank: its leading columns stand for Â where many ranks are compared."""
        quantizer = self._search(self.factors.a, None, bits)
        return quantizer.round_trip(self.factors.a.float())

    def round_rows(self, values: Tensor, hessian: RowHessian, bits: int) -> Rounded:
        """Scales and codes of rows under one Hessian; never worse than nearest rounding with the searched scales."""
        quantizer = self._search(values, hessian, bits)
        norms = hessian.norms(values)
        codes = quantizer.quantize(values.float())
        fitted, least = refit_scale(values, hessian, quantizer, codes, norms)
        best = Rounded(codes, fitted, values.float())
        for sweep in range(SWEEPS + 1):
            if sweep:
                codes = descend(values, hessian, quantizer, codes)
            else:
                codes = gptq(values, hessian, quantizer)
            quantizer, errors = refit_scale(values, hessian, quantizer, codes, norms)
            better = errors < least
            least = torch.where(better, errors, least)
            scale = torch.where(better, quantizer.scale, best.quantizer.scale)
            kept = RowQuantizer(scale, quantizer.zero_point, bits)
            best = Rounded(torch.where(better.unsqueeze(1), codes, best.codes), kept, best.values)
        return best

    def _search(self, values: Tensor, hessian: RowHessian | None, bits: int) -> RowQuantizer:
        values = values.float()
        weights = None if hessian is None else hessian.single.diagonal().expand_as(values)
        return search_quantizer(values, bits, self.percentiles, weights=weights, zero_point=self.zero_point)

    def _with_left(self, target: Tensor, bits_a: int, right: Rounded) -> dict[str, Rounded]:
        """The left factor that fits a rounded right one best, rounded."""
        b = right.dequantize().double()
        weighted = b @ self.metric.inputs
        gram = weighted @ b.T
        level = gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        gram = gram + RIDGE * level * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        a = torch.cholesky_solve(weighted @ target.T, torch.linalg.cholesky(gram)).T
        return {"a": self.round_rows(a, RowHessian(gram), bits_a), "b": right}

    def _with_product(self, bits: int, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        best: dict[str, Rounded] = {}
        least = float("inf")
        product = torch.zeros_like(self.weight)
        for turn in range(TURNS):
            left = self.weight - product
            quantized = self.quantized(bits) if turn == 0 else self.round_rows(left, self.metric.rows, bits)
            remainder = self.weight - quantized.dequantize().double()
            b = self.round_rows(self.metric.svd(remainder).b[:rank], self.metric.rows, bits_b)
            parts = {"weight": quantized, **self._with_left(remainder, bits_a, b)}
            values = {name: part.dequantize().double() for name, part in parts.items()}
            product = values["a"] @ values["b"]
            cost = self.metric.cost(values["weight"] + product - self.weight)
            if cost < least:
                best, least = parts, cost
        return best


def product_costs(
    weight: Tensor, metric: Metric, left: dict[int, Tensor], right: dict[int, Tensor]
) -> dict[tuple[int, int], Tensor]:
    """``tr(G ΔW Σ ΔWᵀ)`` of all leading products ``Â_r B̂_r``, by Gram matrices in float64.

    As in METHOD 4, with ``p_k = a_kᵀ G W Σ b_kᵀ`` and ``P = (Âᵀ G Â) ∘ (B̂ Σ B̂ᵀ)``.

    Args:
        weight: W, ``(out_features, in_features)``.
        metric: Σ and G, of samples that the factors were not fitted to.
        left: ``{bits_a: Â (out_features, k)}``.
        right: ``{bits_b: B̂ (k, in_features)}``.

    Returns:
        ``{(bits_a, bits_b): (k,) float64}``: the cost of rank r at entry ``r - 1``.
    """
    w = weight.double()
    weighted = w @ metric.inputs  # W Σ
    total = metric.cost(w)
    gram_a, gram_b, projected, wide_b = {}, {}, {}, {}
    for bits, values in left.items():
        a = values.double()
        scaled = a.T if metric.gradients is None else a.T @ metric.gradients
        gram_a[bits] = scaled @ a
        projected[bits] = scaled @ weighted
    for bits, values in right.items():
        wide_b[bits] = values.double()
        gram_b[bits] = (wide_b[bits] @ metric.inputs) @ wide_b[bits].T
    costs = {}
    for bits_a in left:
        for bits_b in right:
            costs[bits_a, bits_b] = leading_errors(
                total, projected[bits_a], wide_b[bits_b], gram_a[bits_a], gram_b[bits_b]
            )
    return costs
