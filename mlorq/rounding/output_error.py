"""The output error of a rounded layer in closed form (METHOD 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from mlorq.calibration.blocks import multiply
from mlorq.rounding.paired_forward import InputMoments


def output_error(weight: Tensor, rounded: Tensor, moments: InputMoments) -> float:
    """``E‖W x - Ŵ x̃‖² / out_features`` in closed form, float64.

    With ``E = Ŵ - W``: ``tr(E Σ̃ Eᵀ) - 2 tr(E (W C)ᵀ) + tr(W F Wᵀ)``, where ``Σ̃ = E[x̃x̃ᵀ]``, ``C = E[(x-x̃)x̃ᵀ]`` and
    ``F = E[(x-x̃)(x-x̃)ᵀ]``. The formula uses E because W x and Ŵ x̃ nearly cancel. Of a layer whose moments are blocks it
    leaves out the correlations between blocks.

    Args:
        weight: W, ``(out_features, in_features)``.
        rounded: Ŵ, same shape.
        moments: second moments of the layer's inputs.
    """
    w = weight.double()
    e = rounded.double() - w
    drift = multiply(w, moments.drift_cross)
    total = (multiply(e, moments.compressed) * e).sum() - 2 * (e * drift).sum()
    total = total + (multiply(w, moments.drift) * w).sum()
    return float(torch.clamp(total, min=0) / w.shape[0])
