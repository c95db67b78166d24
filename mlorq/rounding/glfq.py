"""Method ``glfq``: straight-through reconstruction of blocks by the model's last features (GLF-Q; METHOD 9).

The paper's MLP reconstruction is the activation method ``rectified``; the rotation of the residual stream, which it
folds into the weights before, is ``model.rotation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlorq.registry import Settings
from mlorq.rounding.base import (
    METHODS,
    BatchSettings,
    BlockReconstruction,
    InputSettings,
    Parts,
    Progress,
    RoundingMethod,
    RoundingResult,
    RoundingTask,
)
from mlorq.rounding.block import ReconstructionSettings, StepSettings
from mlorq.rounding.nearest import round_to_nearest

if TYPE_CHECKING:
    from mlorq.forms.stored_layer import CompressedLayer
    from mlorq.models.layer_list import Layer
    from mlorq.rounding.paired_forward import PairedForward
    from mlorq.rounding.trainable import Trained


class FeatureSettings(StepSettings):
    """Keys of the reconstruction."""

    local_weight: float = Field(2.0, ge=0, description="weight of the error of the block's output beside the features'")


class FeatureBlockSettings(InputSettings, BatchSettings, FeatureSettings):
    """All keys of the method."""


class _Features(BlockReconstruction[FeatureSettings]):
    settings = FeatureSettings

    def reconstruct(
        self,
        paired: PairedForward,
        block: int,
        layers: Sequence[tuple[Layer, CompressedLayer]],
        settings: FeatureSettings,
        *,
        seed: int,
        parts: Mapping[str, Parts] | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        from mlorq.rounding.block_losses import FeatureLoss
        from mlorq.rounding.reconstruction import reconstruct

        loss = partial(FeatureLoss, local_weight=settings.local_weight)
        steps = ReconstructionSettings.model_validate(settings.model_dump(exclude={"local_weight"}))
        return reconstruct(paired, block, layers, steps, seed=seed, progress=progress, loss=loss)

    def passes(self, settings: Any, blocks: int) -> float:
        return float(0.5 * settings.iterations)


class GlfQ(RoundingMethod[Settings]):
    """Nearest rounding, then training of each block against the features before the model's head."""

    name = "glfq"
    title = "GLF-Q, no rotation"
    settings = FeatureBlockSettings
    layer_settings = Settings
    needs_inputs = False
    blocks = _Features()
    compared_activations: ClassVar[Mapping[str, Any]] = {"method": "rectified", "mlp_weights": "equal"}

    def round(self, task: RoundingTask, settings: Settings, progress: Progress | None = None) -> RoundingResult:
        return round_to_nearest(task)


METHODS.register(GlfQ())
