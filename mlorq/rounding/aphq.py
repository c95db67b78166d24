"""Method ``aphq``: QDrop with errors weighted by a perturbation Hessian (APHQ-ViT, arXiv 2504.02508; METHOD 9).

Its other half, the replacement of GELU by ReLU, is the activation method ``rectified``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mlorq.rounding.base import METHODS, BatchSettings, InputSettings
from mlorq.rounding.block import RangeSettings
from mlorq.rounding.brecq import SoftReconstruction, SoftSettings
from mlorq.rounding.qdrop import QDrop

if TYPE_CHECKING:
    from mlorq.rounding.reconstruction import LossOf


class SoftRangeSettings(SoftSettings, RangeSettings):
    """Keys of soft rounding of blocks that trains the ranges of activations, too."""


class SoftRangeBlockSettings(InputSettings, BatchSettings, SoftRangeSettings):
    """All keys of such a method."""


class DroppingReconstruction(SoftReconstruction):
    """Soft rounding with dropped quantization, trained ranges and a loss of its own.

    Attributes:
        model_passes: forward and backward passes of the rest of the model per sample that the loss takes.
    """

    settings = SoftRangeSettings
    fisher = False
    drop = 0.5
    model_passes: float = 0.0

    def range_rate(self, settings: Any) -> float:
        return float(settings.range_rate)

    def passes(self, settings: Any, blocks: int) -> float:
        rest = 0.5 * self.model_passes * settings.samples / max(1, settings.batch_size)  # on average half the blocks
        return super().passes(settings, blocks) + float(rest)


class _Perturbed(DroppingReconstruction):
    model_passes = 2.0

    def loss(self, settings: Any) -> LossOf | None:
        from mlorq.rounding.block_losses import PerturbationLoss

        return PerturbationLoss


class Aphq(QDrop):
    """Soft rounding of blocks whose errors are weighted by the average perturbation Hessian."""

    name = "aphq"
    title = "APHQ-ViT (2504.02508)"
    settings = SoftRangeBlockSettings
    blocks = _Perturbed()
    compared_activations: ClassVar[Mapping[str, Any]] = {"method": "rectified"}


METHODS.register(Aphq())
