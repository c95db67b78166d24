"""Candidates of a layer in the metric of its second moments, fitted on one fold and judged on the other (METHOD 7)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from mlorq.calibration.covariance import Moments, pooled
from mlorq.codecs.affine import Rounded
from mlorq.fitting.covariance_fit import ClosedForm, Metric, product_costs
from mlorq.fitting.hessian_fit import CandidateSettings, LayerSearch
from mlorq.forms.base import Candidate


class MomentSearch(LayerSearch):
    """Like ``LayerSearch``, with closed forms in place of weighted SVD and nearest rounding.

    Local costs are ``tr(G ΔW Σ ΔWᵀ)`` of the second fold, a token and output entry, for candidates fitted on the first.

    Args:
        weight: W, ``(out_features, in_features)``.
        hessian: H, same shape, for methods that ask for it.
        settings: bit-widths, percentiles and accounting.
        folds: second moments, one record a fold.
    """

    is_fitted = True

    def __init__(self, weight: Tensor, hessian: Tensor, settings: CandidateSettings, folds: Sequence[Moments]) -> None:
        super().__init__(weight, hessian, settings)
        self.folds = folds

    @cached_property
    def fitted(self) -> ClosedForm:
        """Closed forms of the first fold."""
        return self._closed(self.folds[0])

    @cached_property
    def judge(self) -> Metric:
        """The metric of the last fold, as it is: what has no variance there costs nothing there."""
        last = self.folds[-1]
        return Metric(last.inputs, last.shrunk()[1])

    def output_metric(self) -> Tensor:
        return pooled(self.folds).shrunk()[1]

    def _closed(self, moments: Moments) -> ClosedForm:
        metric = Metric(*moments.shrunk())
        return ClosedForm(self.weight, metric, self.settings.percentiles, self.settings.zero_point)

    def rounded_parts(self, candidate: Candidate) -> dict[str, Rounded]:
        return self.fitted.rounded(candidate)

    # -- costs ----------------------------------------------------------------------------------------------

    def _mean(self, cost: float) -> float:
        return max(0.0, cost) / self.weight.numel()

    def quantized_cost(self, bits: int) -> float:
        return self._mean(self.judge.cost(self.fitted.quantized(bits).dequantize() - self.weight))

    def low_rank_costs(self) -> dict[tuple[int, int], np.ndarray]:
        costs = self._product_costs(self.fitted, self.settings.factor_bits)
        return {pair: cost / self.weight.numel() for pair, cost in costs.items()}

    def sum_costs(self) -> dict[Candidate, float]:
        """All ranks of a bit-width at the price of one decomposition of what ``Q`` leaves of W."""
        wanted = self.sum_candidates()
        found: dict[Candidate, float] = {}
        for bits in sorted({candidate.bits for candidate in wanted if candidate.bits}):
            remainder = self.weight - self.fitted.quantized(bits).dequantize()
            settings = self.settings
            left_over = ClosedForm(remainder, self.fitted.metric, settings.percentiles, settings.zero_point)
            costs = self._product_costs(left_over, settings.sum_factor_bits)
            for candidate in wanted:
                if candidate.bits == bits and candidate.bits_a and candidate.bits_b and candidate.rank:
                    cost = costs[candidate.bits_a, candidate.bits_b][candidate.rank - 1]
                    found[candidate] = self._mean(float(cost))
        return {candidate: found[candidate] for candidate in wanted}

    def _product_costs(self, closed: ClosedForm, widths: Sequence[int]) -> dict[tuple[int, int], np.ndarray]:
        left = {bits: closed.left_at_all_ranks(bits) for bits in widths}
        right = {bits: closed.right(bits).dequantize() for bits in widths}
        costs = product_costs(closed.weight, self.judge, left, right)
        return {pair: cost.cpu().numpy() for pair, cost in costs.items()}
