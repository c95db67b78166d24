"""Method ``brecq``: soft rounding of blocks that starts from nearest rounding (BRECQ, arXiv 2102.05426; METHOD 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlorq.registry import Settings
from mlorq.rounding.base import (
    METHODS,
    BatchSettings,
    BlockReconstruction,
    InputSettings,
    IterationSettings,
    Parts,
    Progress,
    RoundingMethod,
    RoundingResult,
    RoundingTask,
)
from mlorq.rounding.nearest import round_to_nearest

if TYPE_CHECKING:
    from mlorq.forms.stored_layer import CompressedLayer
    from mlorq.models.layer_list import Layer
    from mlorq.rounding.paired_forward import PairedForward
    from mlorq.rounding.reconstruction import LossOf
    from mlorq.rounding.trainable import Trained


class SoftSettings(IterationSettings):
    """Keys of soft rounding of blocks."""

    soft_rate: float = Field(0.02, gt=0, description="step size of soft rounding")
    soft_weight: float = Field(0.01, ge=0, description="weight of the rounding regulariser")


class SoftBlockSettings(InputSettings, BatchSettings, SoftSettings):
    """All keys of the method."""


class SoftReconstruction(BlockReconstruction[SoftSettings]):
    """Soft rounding of a block.

    Attributes:
        fisher: whether entries of the block's output are weighted by squared gradients of the model's output.
            Derived classes with a loss of their own (``loss``) ignore it.
        drop: fraction of activations that stay float in each step.
    """

    settings = SoftSettings
    needs_parts = True
    fisher: ClassVar[bool] = True
    drop: ClassVar[float] = 0.0

    def reconstruct(
        self,
        paired: PairedForward,
        block: int,
        layers: Sequence[tuple[Layer, CompressedLayer]],
        settings: SoftSettings,
        *,
        seed: int,
        parts: Mapping[str, Parts] | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        from mlorq.rounding.reconstruction import reconstruct_softly

        assert parts is not None
        loss = self.loss(settings)
        return reconstruct_softly(
            paired,
            block,
            layers,
            settings,
            parts,
            seed=seed,
            fisher=self.fisher and loss is None,
            drop=self.drop,
            progress=progress,
            loss=loss,
            range_rate=self.range_rate(settings),
        )

    def loss(self, settings: Any) -> LossOf | None:
        """Makes the loss of a block; None: its squared error, as ``fisher`` says."""
        return None

    def range_rate(self, settings: Any) -> float:
        """Step size of the ranges of activations, relative to their size; 0: fixed."""
        return 0.0

    def passes(self, settings: Any, blocks: int) -> float:
        return float(settings.iterations / max(1, blocks))


class Brecq(RoundingMethod[Settings]):
    """BRECQ: soft rounding of blocks against the float block's output."""

    name = "brecq"
    title = "BRECQ (2102.05426)"
    settings: type[Settings] = SoftBlockSettings
    layer_settings = Settings
    needs_inputs = False
    blocks: ClassVar[BlockReconstruction[Any] | None] = SoftReconstruction()
    compared = True

    def round(self, task: RoundingTask, settings: Settings, progress: Progress | None = None) -> RoundingResult:
        return round_to_nearest(task)


METHODS.register(Brecq())
