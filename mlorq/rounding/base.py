"""What a rounding method is: it finds the codes of a chosen candidate, and says what it reads and costs.

A method is a record in ``METHODS``: the configuration keys that it reads, whether it looks at the layer's inputs in the
partly compressed model, its function for one layer, and those for a block and for the whole model where it has any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field

from mlorq.forms.base import FORMS, Candidate
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.activations.plan import ActivationPlan
    from mlorq.calibration.token_importance import Importance
    from mlorq.codecs.affine import Rounded, RowQuantizer
    from mlorq.fitting.base import LayerFit
    from mlorq.fitting.hessian_fit import HessianFit
    from mlorq.forms.stored_layer import CompressedLayer
    from mlorq.models.base import FloatModel
    from mlorq.models.layers import Layer
    from mlorq.rounding.paired_forward import InputMoments, PairedForward
    from mlorq.rounding.trainable import Trained

Progress = Callable[[int, int], None]
Parts = Mapping[str, "tuple[Tensor, RowQuantizer]"]


@dataclass(frozen=True)
class RoundingTask:
    """One layer to round.

    Attributes:
        layer: its name.
        candidate: its form.
        fit: its weight, and nearest rounding under the label-free Hessian.
        output_metric: G, the second moment of the output's gradients or what stands for it, for closed forms.
        moments: second moments of its inputs in the float and in the partly compressed model; None where the method
            does not ask for them, and for grouped convolutions, whose rows see different inputs.
        bias: the layer's, ``(out_features,)`` float32, where the layer has one of its own.
    """

    layer: str
    candidate: Candidate
    fit: HessianFit
    output_metric: Callable[[], Tensor]
    moments: InputMoments | None = None
    bias: Tensor | None = None

    def rounded(self, fit: LayerFit | None = None) -> dict[str, Rounded]:
        """The candidate's matrices, rounded by a fit; default: to nearest."""
        return FORMS[self.candidate.form].fit(self.fit if fit is None else fit, self.candidate)


@dataclass(frozen=True)
class RoundingResult:
    """A rounded layer.

    Attributes:
        layer: the stored layer.
        error_before: ``E‖W x - Ŵ x̃‖² / out_features`` with nearest rounding; None where no inputs were looked at.
        error_after: the same with the codes (and the bias) returned.
        iterations: optimiser steps taken.
    """

    layer: CompressedLayer
    error_before: float | None = None
    error_after: float | None = None
    iterations: int = 0


class InputSettings(Settings):
    """Of methods that look at the layers' inputs."""

    samples: int = Field(1024, ge=1, description="most calibration samples used")


class IterationSettings(Settings):
    """Of methods that iterate."""

    iterations: int = Field(500, ge=1, description="iterations per layer (of the paper: 20000), or steps per block")


class BatchSettings(Settings):
    """Of methods that train on blocks."""

    batch_size: int = Field(8, ge=1, description="samples per step")


class TrainingSettings(InputSettings, BatchSettings):
    """Of blocks and of the whole model: which samples are trained on."""


Config = TypeVar("Config", bound=Settings)


class RoundingMethod(ABC, Generic[Config]):
    """One way to find codes.

    Attributes:
        name: as configurations have it.
        title: for people, with the paper's number.
        settings: all configuration keys that it reads.
        layer_settings: those that the codes of one layer depend on before any block is reconstructed.
        needs_inputs: whether it reads the moments of a layer's inputs, so that layers are rounded in execution order.
        blocks: what is done to each block as soon as its layers are rounded; None: nothing.
        tuning: what is done to all layers together at the end; None: nothing.
        compared: whether ``mlorq compare`` shows it at a uniform bit-width where no methods are named.
        compared_activations: how ``mlorq compare`` quantizes activations beside it.
    """

    name: str
    title: str
    settings: type[Settings]
    layer_settings: type[Config]
    needs_inputs: ClassVar[bool] = True
    blocks: ClassVar[BlockReconstruction[Any] | None] = None
    tuning: ClassVar[Tuning[Any] | None] = None
    compared: ClassVar[bool] = False
    compared_activations: ClassVar[Mapping[str, Any]] = {"method": "repq"}

    @property
    def sequential(self) -> bool:
        """Whether layers are rounded one after another: each sees those before it in their final form."""
        return self.needs_inputs or self.blocks is not None

    @abstractmethod
    def round(self, task: RoundingTask, settings: Config, progress: Progress | None = None) -> RoundingResult:
        """Round one layer.

        Args:
            task: the layer; with ``moments`` where the method needs inputs.
            settings: the keys that it reads.
            progress: called with (iterations done, iterations).
        """

    def start(self, task: RoundingTask) -> Parts | None:
        """Matrices with their quantizers from which another method may start; None where there are none."""
        return None

    def layer_work(self, params: int, in_features: int, settings: Settings) -> float:
        """Multiply-adds that rounding one layer costs beyond its fit, for estimates.

        Args:
            params: entries of W.
            in_features: columns of W.
            settings: the whole ``rounding`` section.
        """
        return 0.0


class BlockReconstruction(ABC, Generic[Config]):
    """What a method does to a block whose layers are rounded.

    Attributes:
        settings: the configuration keys that it reads beside samples and batch size.
        needs_parts: whether it reads the float matrices of the layers with their quantizers.
    """

    settings: type[Config]
    needs_parts: ClassVar[bool] = False

    @abstractmethod
    def reconstruct(
        self,
        paired: PairedForward,
        block: int,
        layers: Sequence[tuple[Layer, CompressedLayer]],
        settings: Config,
        *,
        seed: int,
        parts: Mapping[str, Parts] | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        """Optimise the layers of one block.

        Args:
            paired: the float model and its copy in which all layers up to this block's are compressed.
            block: index of the block.
            layers: of the block, as they are rounded.
            settings: the keys that it reads.
            seed: of the order of batches and all else that is drawn.
            parts: by layer, where ``needs_parts``: the float matrices that it stores, with their quantizers.
            progress: called with (steps done, steps).

        Returns:
            The layers; the copy in ``paired`` is as it was: set what is returned.
        """

    def passes(self, settings: Settings, blocks: int) -> float:
        """Forward and backward passes of the whole model that one block costs, per sample of a batch, for estimates.

        Args:
            settings: the whole ``rounding`` section.
            blocks: how many the model has.
        """
        return 0.0


class Tuning(ABC, Generic[Config]):
    """What a method does to all layers together, after the last block.

    Attributes:
        settings: the configuration keys that it reads beside samples and batch size.
    """

    settings: type[Config]

    @abstractmethod
    def steps(self, settings: Settings) -> int:
        """How many steps the ``rounding`` section asks for; 0: none."""

    @abstractmethod
    def tune(
        self,
        model: FloatModel,
        blocks: Sequence[str],
        layers: Sequence[tuple[Layer, CompressedLayer]],
        batches: Sequence[Any],
        settings: Config,
        *,
        seed: int,
        device: str = "cpu",
        progress: Progress | None = None,
        importance: Sequence[Importance] | None = None,
        activations: ActivationPlan | None = None,
        tables: Mapping[str, CompressedLayer] | None = None,
    ) -> Trained:
        """Train all compressed layers together; ``rounding.finetune.tune`` says what the arguments are."""


METHODS: Registry[RoundingMethod[Any]] = Registry("rounding method")
