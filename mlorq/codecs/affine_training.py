"""Training of affine codes and their scales (METHOD 7)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mlorq.codecs.affine import QuantizedMatrix, stored_scale


class TrainableAffine:
    """Codes, trained with the straight-through estimator, and scales; implements ``mlorq.codecs.base.Trainable``.

    Args:
        matrix: the matrix from which training starts.
        device: of the parameters.
    """

    def __init__(self, matrix: QuantizedMatrix, device: torch.device | str) -> None:
        self.stored = matrix
        self.zero = matrix.zero_point.float().to(device).unsqueeze(1)
        self.base = matrix.scale.float().to(device).unsqueeze(1)
        self.top = 2**matrix.bits - 1
        self.latent = nn.Parameter(matrix.codes.float().to(device))
        self.growth = nn.Parameter(torch.zeros_like(self.base))  # logarithm of scale / base

    def scale(self) -> Tensor:
        """Scales, ``(rows, 1)`` float32, before they are rounded to what is stored."""
        return self.base * self.growth.exp()

    def values(self) -> Tensor:
        """Dequantized values; gradients pass through rounding, and are 0 for clamped codes."""
        inside = self.latent.clamp(0, self.top)
        codes = inside + (inside.round() - inside).detach()
        scale = self.scale()
        stored = stored_scale(scale.detach(), self.stored.codec.zero_point)
        return (codes - self.zero) * (scale + (stored - scale).detach())

    def result(self) -> QuantizedMatrix:
        """The matrix with its current codes and scales, on the CPU."""
        codes = self.latent.detach().clamp(0, self.top).round().to(torch.uint8).cpu()
        scale = stored_scale(self.scale().detach().squeeze(1), self.stored.codec.zero_point)
        return replace(self.stored, codes=codes, scale=scale.to(self.stored.scale.dtype).cpu())
