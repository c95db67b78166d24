"""Training of the scales of trellis codes, whose codes stay fixed (METHOD 7, 10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlorq.codecs.trellis import TrellisMatrix


class TrainableTrellis:
    """Scales as logarithms of their growth; implements ``mlorq.codecs.base.Trainable``.

    Args:
        matrix: the matrix from which training starts.
        device: of the parameters.
    """

    latent = None

    def __init__(self, matrix: TrellisMatrix, device: torch.device | str) -> None:
        self.stored = matrix
        self.unit = matrix.to(device).unit()
        self.start = matrix.scales().to(device)
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    def values(self) -> Tensor:
        """Dequantized values; gradients pass through the rounding of the scales."""
        scales = self.start * self.growth.exp()
        stored = self.stored.with_scales(scales).scales().to(scales.device)
        return self.unit * (scales + (stored - scales).detach()).unsqueeze(1)

    def result(self) -> TrellisMatrix:
        """The matrix with its current scales, on the CPU."""
        return self.stored.with_scales(self.start * self.growth.exp()).to("cpu")
