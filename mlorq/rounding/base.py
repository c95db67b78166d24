"""Records that all rounding methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlorq.forms.base import CompressedLayer
from mlorq.rounding.paired_forward import InputMoments


@dataclass(frozen=True)
class RoundingSettings:
    """Settings of all methods; the fields mean what they mean in ``RoundingConfig``."""

    method: str = "lra"
    iterations: int = 500
    learning_rate: float = 0.3
    regularisation: float = 0.3
    beta_start: float = 20.0
    beta_end: float = 2.0
    warm_up: float = 0.2
    stop_loss: float = 1e-8
    start: Literal["nearest", "closed_form", "erq"] = "nearest"


@dataclass(frozen=True)
class RoundingResult:
    """A rounded layer.

    Attributes:
        layer: the stored layer.
        error_before: ``E‖W x - Ŵ x̃‖² / out_features`` with nearest rounding; None where no inputs were looked at.
        error_after: the same with the codes (and the bias) returned; of ``lra`` never above ``error_before``.
        iterations: optimiser steps taken.
    """

    layer: CompressedLayer
    error_before: float | None = None
    error_after: float | None = None
    iterations: int = 0


def output_error(weight: Tensor, rounded: Tensor, moments: InputMoments) -> float:
    """``E‖W x - Ŵ x̃‖² / out_features`` in closed form, float64.

    With ``E = Ŵ - W``: ``tr(E Σ̃ Eᵀ) - 2 tr(E (W C)ᵀ) + tr(W F Wᵀ)``, where ``Σ̃ = E[x̃x̃ᵀ]``, ``C = E[(x-x̃)x̃ᵀ]`` and
    ``F = E[(x-x̃)(x-x̃)ᵀ]``; written in E, because W x and Ŵ x̃ nearly cancel.

    Args:
        weight: W, ``(out_features, in_features)``.
        rounded: Ŵ, same shape.
        moments: of the layer's inputs.
    """
    w = weight.double()
    e = rounded.double() - w
    drift = w @ moments.drift_cross
    total = (e @ moments.compressed * e).sum() - 2 * (e * drift).sum() + (w @ moments.drift * w).sum()
    return float(torch.clamp(total, min=0) / w.shape[0])
