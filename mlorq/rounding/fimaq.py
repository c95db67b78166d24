"""Method ``fimaq``: QDrop with a diagonal plus low-rank Fisher matrix (FIMA-Q, arXiv 2506.11543; METHOD 9)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mlorq.rounding.aphq import DroppingReconstruction, SoftRangeSettings
from mlorq.rounding.base import METHODS, BatchSettings, InputSettings
from mlorq.rounding.qdrop import QDrop

if TYPE_CHECKING:
    from mlorq.rounding.reconstruction import LossOf


class LowRankSettings(SoftRangeSettings):
    """Keys of the reconstruction."""

    fisher_rank: int = Field(
        15,
        ge=1,
        description="rank of the Fisher matrix, reached in equal intervals, each with a pass over all samples",
    )


class LowRankBlockSettings(InputSettings, BatchSettings, LowRankSettings):
    """All keys of the method."""


class _LowRank(DroppingReconstruction):
    settings = LowRankSettings

    def loss(self, settings: Any) -> LossOf | None:
        from mlorq.rounding.block_losses import LowRankLoss

        return partial(LowRankLoss, rank=settings.fisher_rank, steps=settings.iterations)

    def passes(self, settings: Any, blocks: int) -> float:
        one = 0.5 * settings.samples / max(1, settings.batch_size)
        return super().passes(settings, blocks) + float(settings.fisher_rank * one)


class FimaQ(QDrop):
    """Soft rounding of blocks under an approximate Fisher matrix of their outputs."""

    name = "fimaq"
    title = "FIMA-Q (2506.11543)"
    settings = LowRankBlockSettings
    blocks = _LowRank()


METHODS.register(FimaQ())
