"""Local costs of trellis codes from the codes of one cycle of rows (METHOD 10).

With feedback along rows and columns, an error ``s_i e`` of one coded value costs ``(s_i e)² u_i v_j`` once the later
values have compensated for it, where u and v depend on the metric alone:

    u_i = (Mᵀ G M)_ii,  M = [I; (U_bb⁻¹ U_b,later)ᵀ] for the cycle b of row i  (``mlorq.fitting.trellis``).

Errors of different values are nearly uncorrelated, and v is the same for all rows. The first cycle's part in the cost
of a layer is therefore known before anything is coded: the sum of ``‖w_i‖² u_i`` over its rows, over that of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mlorq.calibration.blocks import multiply
from mlorq.codecs.rotation import rotate_both
from mlorq.codecs.trellis import stream
from mlorq.fitting.trellis import TrellisFit

LEAST_PART = 0.25  # of the first cycle's part in the cost, over its part in the rows


def trellis_costs(
    fit: TrellisFit, weight: Tensor, widths: Sequence[int], inputs: Tensor, gradients: Tensor
) -> list[float] | None:
    """``tr(G ΔW Σ ΔWᵀ)`` of codes of one pass, for several numbers of bits.

    Exact if the rows are one cycle, else an estimate (METHOD 10 says how good). None if the first cycle has too little
    of the weight to stand for the others.

    Args:
        fit: of the codes, which has a metric of its own.
        weight: W, ``(out_features, in_features)``.
        widths: values of k.
        inputs: Σ of the costs, ``(in_features, in_features)`` or blocks like those of the fit.
        gradients: G of the costs, ``(out_features, out_features)``.
    """
    order, _, _, bounds = stream(len(weight))
    places = torch.from_numpy(order).to(weight.device)
    g = gradients.double()[places][:, places]
    sigma = inputs.double() if fit.seed is None else rotate_both(inputs.double(), fit.seed)
    powers = fit.target(weight).square().sum(1) * row_shares(fit, bounds, g)
    part, whole = float(powers[: bounds[1]].sum()), float(powers.sum())
    if part < LEAST_PART * whole * bounds[1] / len(weight):
        return None
    metric = _cycle_metric(fit, 0, bounds[1], g)
    errors = fit.first_cycle_errors(weight, widths)
    costs = [float(((metric @ error) * multiply(error, sigma)).sum()) for error in errors]
    return [cost * whole / part if part > 0 else 0.0 for cost in costs]


def row_shares(fit: TrellisFit, bounds: Sequence[int], gradients: Tensor) -> Tensor:
    """u, what the squared errors of the rows cost after feedback along rows, ``(out_features,)`` float64.

    Args:
        fit: has the feedback.
        bounds: of the cycles, in rows.
        gradients: G, rows and columns in the order of the stream.
    """
    return torch.cat([_cycle_metric(fit, start, stop, gradients).diagonal() for start, stop in pairwise(bounds)])


def _cycle_metric(fit: TrellisFit, start: int, stop: int, gradients: Tensor) -> Tensor:
    """``Mᵀ G M`` of one cycle, ``(rows, rows)``: G once later rows have compensated."""
    identity = torch.eye(stop - start, dtype=torch.float64, device=gradients.device)
    spread = torch.cat([identity, fit.feedback(start, stop).T])
    return spread.T @ gradients[start:, start:] @ spread
