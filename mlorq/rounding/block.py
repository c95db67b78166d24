"""Method ``block``: closed forms, then block reconstruction, then tuning of the whole model (METHOD 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mlorq.registry import Settings
from mlorq.rounding.base import (
    METHODS,
    BatchSettings,
    BlockReconstruction,
    IterationSettings,
    Parts,
    Progress,
    RoundingMethod,
    RoundingResult,
    RoundingTask,
    Tuning,
)
from mlorq.rounding.closed_form import ClosedFormSettings, round_closed_form
from mlorq.rounding.gptq import WORK

if TYPE_CHECKING:
    from mlorq.forms.stored_layer import CompressedLayer
    from mlorq.models.base import FloatModel
    from mlorq.models.layer_list import Layer
    from mlorq.rounding.paired_forward import PairedForward
    from mlorq.rounding.trainable import Trained


class RangeSettings(Settings):
    """Step size of the ranges of activations."""

    range_rate: float = Field(
        1e-3, ge=0, description="step size of the ranges of quantized activations, relative to their size; 0: fixed"
    )


class RateSettings(RangeSettings):
    """Step sizes of scales, biases, norms and ranges of activations."""

    scale_rate: float = Field(1e-3, ge=0, description="step size of scales, relative to their size")
    bias_rate: float = Field(1e-4, ge=0, description="step size of biases")
    norm_rate: float = Field(
        5e-4,
        ge=0,
        description="step size of the scales and shifts of normalisation layers, relative to the layer's scales; "
        "0: fixed",
    )


class StepSettings(IterationSettings, RateSettings):
    """Number of steps, and all step sizes."""

    code_rate: float = Field(0.01, gt=0, description="step size of the codes, in units of codes")


class ReconstructionSettings(StepSettings):
    """Keys of block reconstruction."""

    loss: Literal["block", "output"] = Field(
        "block", description="error of the block's output, or of the model's output with float blocks after it"
    )
    drop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of activations that stay float in each step (arXiv 2203.05740: 0.5)",
    )


class TuningSettings(RateSettings):
    """Keys of tuning all layers together."""

    tuning: int = Field(0, ge=0, description="number of steps that train all layers together at the end; 0: none")
    tuning_rate: float = Field(0.005, gt=0, description="step size of the codes during tuning, in units of codes")


class BlockSettings(ClosedFormSettings, BatchSettings, ReconstructionSettings, TuningSettings):
    """All keys of the method."""


class LayerSettings(ClosedFormSettings, BatchSettings):
    """Keys on which a layer's codes depend before its block is reconstructed."""


class _Reconstruction(BlockReconstruction[ReconstructionSettings]):
    settings = ReconstructionSettings

    def reconstruct(
        self,
        paired: PairedForward,
        block: int,
        layers: Sequence[tuple[Layer, CompressedLayer]],
        settings: ReconstructionSettings,
        *,
        seed: int,
        parts: Mapping[str, Parts] | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        from mlorq.rounding.reconstruction import reconstruct

        return reconstruct(paired, block, layers, settings, seed=seed, progress=progress)

    def passes(self, settings: Any, blocks: int) -> float:
        return float(settings.iterations * (1 / max(1, blocks) if settings.loss == "block" else 0.5))


class _Tuning(Tuning[TuningSettings]):
    settings = TuningSettings

    def steps(self, settings: Any) -> int:
        return int(settings.tuning)

    def tune(
        self,
        model: FloatModel,
        blocks: Sequence[str],
        layers: Sequence[tuple[Layer, CompressedLayer]],
        batches: Sequence[Any],
        settings: TuningSettings,
        **options: Any,
    ) -> Trained:
        from mlorq.rounding.finetune import tune

        return tune(model, blocks, layers, batches, settings, **options)


class Block(RoundingMethod[LayerSettings]):
    """Closed forms, block reconstruction, tuning."""

    name = "block"
    title = "block reconstruction"
    settings = BlockSettings
    layer_settings = LayerSettings
    blocks = _Reconstruction()
    tuning = _Tuning()

    def round(self, task: RoundingTask, settings: LayerSettings, progress: Progress | None = None) -> RoundingResult:
        return round_closed_form(task, settings)

    def layer_work(self, params: int, width: int, settings: Settings) -> float:
        return WORK * params * width


METHODS.register(Block())
