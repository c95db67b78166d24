"""Soft rounding of blocks as in BRECQ and QDrop (arXiv 2102.05426, 2203.05740; AdaRound, 2004.10568; METHOD 9).

A code is ``floor(w/s) + h(α) + z`` with the rectified sigmoid ``h(α) = clamp(1.2 σ(α) - 0.1, 0, 1)``. Initially h(α) is
the fractional part of w/s; final codes round up if ``α ≥ 0``. Scales are fixed. The regulariser
``λ Σ mean(1 - |2h(α) - 1|^β)`` draws h to 0 or 1; it starts after a fifth of the steps, and β falls from 20 to 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlorq.codecs.affine import QuantizedMatrix, RowQuantizer
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.layer_list import Layer
from mlorq.rounding.base import Parts
from mlorq.rounding.rectified_sigmoid import GAMMA, ZETA
from mlorq.rounding.trainable import TrainableLayer

BETA_START, BETA_END, WARM_UP = 20.0, 2.0, 0.2
MARGIN = 1e-3  # smallest distance of initial fractions from 0 and 1, for a finite α


class SoftMatrix:
    """A matrix with learnable rounding; implements ``mlorq.codecs.base.Trainable``; scales are fixed."""

    growth = None

    def __init__(self, values: Tensor, quantizer: RowQuantizer) -> None:
        scale = quantizer.scale.unsqueeze(1)
        floor = (values / scale).floor()
        fraction = (values / scale - floor).clamp(MARGIN, 1 - MARGIN)
        self.quantizer = quantizer
        self.base = floor + quantizer.zero_point.unsqueeze(1)
        self.top = 2**quantizer.bits - 1
        self.latent = nn.Parameter(torch.logit((fraction - GAMMA) / (ZETA - GAMMA)))
        self.hard = False

    def rounding(self) -> Tensor:
        """h(α); rounded to 0 or 1 if ``hard``."""
        if self.hard:
            return (self.latent >= 0).to(self.base.dtype)
        return (self.latent.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def values(self) -> Tensor:
        """Dequantized values, differentiable."""
        return self.quantizer.dequantize((self.base + self.rounding()).clamp(0, self.top))

    def result(self) -> QuantizedMatrix:
        codes = (self.base + (self.latent.detach() >= 0)).clamp(0, self.top)
        return self.quantizer.store(codes)


class SoftLayer(TrainableLayer):
    """A layer with soft rounding of its codes and a fixed bias.

    Args:
        root, layer, compressed: as for ``TrainableLayer``.
        parts: float matrices and quantizers of the matrices that the layer stores.
    """

    def __init__(
        self,
        root: nn.Module,
        layer: Layer,
        compressed: CompressedLayer,
        parts: Parts,
    ) -> None:
        super().__init__(root, layer, compressed)
        self.soft = {name: SoftMatrix(values, quantizer) for name, (values, quantizer) in parts.items()}
        self.matrices |= self.soft  # codes that are found together stay fixed
        self.bias = None


class Regulariser:
    """``λ Σ mean(1 - |2h - 1|^β)`` over all matrices; each call is one step of the schedule of β."""

    def __init__(self, layers: Sequence[SoftLayer], steps: int, weight: float) -> None:
        self._matrices = [matrix for layer in layers for matrix in layer.soft.values()]
        self._steps, self._weight, self._done = steps, weight, 0

    def __call__(self) -> Tensor:
        warm = WARM_UP * self._steps
        share = max(0.0, (self._done - warm) / max(1.0, self._steps - warm))
        self._done += 1
        if share == 0 or not self._matrices:  # there is none in a block of trellis codes
            return torch.zeros(())
        beta = BETA_START + (BETA_END - BETA_START) * share
        parts = [(1 - (2 * matrix.rounding() - 1).abs().pow(beta)).mean() for matrix in self._matrices]
        return self._weight * torch.stack(parts).sum()


def set_hard(layers: Sequence[TrainableLayer], hard: bool) -> None:
    """Switch soft layers between soft and final codes."""
    for layer in layers:
        for matrix in layer.matrices.values():
            if isinstance(matrix, SoftMatrix):
                matrix.hard = hard
