"""Method ``lsvit``: QDrop with a Hessian fitted by least squares (LS-ViT, CVPR 2026; METHOD 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlorq.rounding.aphq import DroppingReconstruction, SoftRangeBlockSettings
from mlorq.rounding.base import METHODS
from mlorq.rounding.qdrop import QDrop

if TYPE_CHECKING:
    from mlorq.rounding.reconstruction import LossOf


class _LeastSquares(DroppingReconstruction):
    model_passes = 1.0

    def loss(self, settings: Any) -> LossOf | None:
        from mlorq.rounding.block_losses import LeastSquaresLoss

        return LeastSquaresLoss


class LsVit(QDrop):
    """Soft rounding of blocks under a diagonal and a rank-one Hessian that all samples share."""

    name = "lsvit"
    title = "LS-ViT (CVPR 2026)"
    settings = SoftRangeBlockSettings
    blocks = _LeastSquares()


METHODS.register(LsVit())
