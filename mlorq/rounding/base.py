"""The interface of rounding methods, which compute the codes of a chosen candidate, and their registry.

A method is a record in ``METHODS``: the configuration keys that it reads, whether it needs the layer's inputs in the
partly compressed model, its function for one layer, and optional functions for a block and for the whole model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field

from mlorq.forms.base import FORMS, Candidate, Form
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.activations.plan import ActivationPlan
    from mlorq.calibration.token_importance import Importance
    from mlorq.codecs.affine import Rounded, RowQuantizer
    from mlorq.codecs.base import FittedMatrix
    from mlorq.fitting.base import LayerFit
    from mlorq.fitting.hessian_fit import HessianFit
    from mlorq.forms.stored_layer import CompressedLayer
    from mlorq.models.base import FloatModel
    from mlorq.models.layer_list import Layer
    from mlorq.rounding.paired_forward import InputMoments, PairedForward
    from mlorq.rounding.trainable import Trained

Progress = Callable[[int, int], None]
Parts = Mapping[str, "tuple[Tensor, RowQuantizer]"]


@dataclass(frozen=True)
class RoundingTask:
    """One layer to round.

    Attributes:
        layer: name of the layer.
        candidate: form, bit-widths and rank.
        fit: the layer's weight, and nearest rounding under the label-free Hessian.
        output_metric: returns G, ``(out_features, out_features)``, the second moment of the output gradients or a
            substitute for it, for closed forms; None for the identity.
        moments: second moments of the inputs in the float and in the partly compressed model; None if the method does
            not need them, and for grouped convolutions, whose rows have different inputs.
        bias: the layer's bias, ``(out_features,)`` float32; None if it has none, or shares it.
    """

    layer: str
    candidate: Candidate
    fit: HessianFit
    output_metric: Callable[[], Tensor | None]
    moments: InputMoments | None = None
    bias: Tensor | None = None

    @property
    def form(self) -> Form[Any]:
        """The candidate's form."""
        return FORMS[self.candidate.form]

    def separate_parts(self, fit: LayerFit | None = None) -> dict[str, Rounded]:
        """The rounded matrices whose codes can be rounded one by one; none if the form's codes are found together."""
        from mlorq.codecs.affine import Rounded

        found = self.rounded(fit) if self.form.separate else {}
        return {name: part for name, part in found.items() if isinstance(part, Rounded)}

    def parts(self, fit: LayerFit | None = None) -> Parts:
        """Their float matrices and quantizers, by name."""
        return {name: (part.values, part.quantizer) for name, part in self.separate_parts(fit).items()}

    def rounded(self, fit: LayerFit | None = None) -> Mapping[str, FittedMatrix]:
        """The candidate's matrices as rounded by a fit; default: nearest rounding."""
        return FORMS[self.candidate.form].fit(self.fit if fit is None else fit, self.candidate)


@dataclass(frozen=True)
class RoundingResult:
    """A rounded layer.

    Attributes:
        layer: the stored layer.
        error_before: ``E‖W x - Ŵ x̃‖² / out_features`` with nearest rounding; None without moments of the inputs.
        error_after: the same with the codes (and the bias) of ``layer``.
        iterations: optimiser steps taken.
    """

    layer: CompressedLayer
    error_before: float | None = None
    error_after: float | None = None
    iterations: int = 0


class InputSettings(Settings):
    """Keys of methods that use the layers' inputs."""

    samples: int = Field(1024, ge=1, description="maximum number of calibration samples used")


class IterationSettings(Settings):
    """Keys of iterative methods."""

    iterations: int = Field(500, ge=1, description="iterations per layer (paper: 20000), or steps per block")


class BatchSettings(Settings):
    """Keys of methods that train on batches of samples."""

    batch_size: int = Field(8, ge=1, description="samples per step")


class TrainingSettings(InputSettings, BatchSettings):
    """Keys that choose the training samples of blocks and of the whole model."""


Config = TypeVar("Config", bound=Settings)


class RoundingMethod(ABC, Generic[Config]):
    """A method of computing codes.

    Attributes:
        name: its name in configurations.
        title: its name in tables, with the paper's number.
        settings: class of all configuration keys that it reads.
        layer_settings: class of the keys on which a layer's codes depend before its block is reconstructed.
        needs_inputs: whether it uses the moments of a layer's inputs, so that layers are rounded in execution order.
        blocks: reconstruction of each block after its layers are rounded; None: none.
        tuning: training of all layers together at the end; None: none.
        compared: whether ``mlorq compare`` includes it by default, at a uniform bit-width.
        compared_activations: settings of activation quantization with which ``mlorq compare`` combines it.
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
        """Whether layers are rounded in execution order, each with the final forms of the layers before it."""
        return self.needs_inputs or self.blocks is not None

    @abstractmethod
    def round(self, task: RoundingTask, settings: Config, progress: Progress | None = None) -> RoundingResult:
        """Round one layer.

        Args:
            task: the layer, with ``moments`` if the method needs inputs.
            settings: the method's keys for one layer.
            progress: called with (iterations done, iterations).
        """

    def start(self, task: RoundingTask) -> Parts | None:
        """Float matrices and quantizers from which another method can start; None if there are none."""
        return None

    def layer_work(self, params: int, width: int, settings: Settings) -> float:
        """Multiply-adds of rounding one layer, without those of its fit, for estimates.

        Args:
            params: number of entries of W.
            width: number of columns of W, or of a block of them (``mlorq.memory.block_width``).
            settings: the whole ``rounding`` section.
        """
        return 0.0


class BlockReconstruction(ABC, Generic[Config]):
    """A method's optimisation of a block whose layers are rounded.

    Attributes:
        settings: class of the configuration keys that it reads in addition to samples and batch size.
        needs_parts: whether it needs the layers' float matrices and quantizers.
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
            layers: the rounded layers of the block.
            settings: the keys of the reconstruction.
            seed: of the order of batches and all random numbers.
            parts: by layer name, if ``needs_parts``: float matrices and quantizers of the matrices that it stores.
            progress: called with (steps done, steps).

        Returns:
            The optimised layers and norms; the copy in ``paired`` is unchanged: call ``paired.set`` for each layer and
            ``paired.set_rest``.
        """

    def passes(self, settings: Settings, blocks: int) -> float:
        """Cost of one block per sample of a batch, in forward and backward passes of the whole model, for estimates.

        Args:
            settings: the whole ``rounding`` section.
            blocks: number of blocks of the model.
        """
        return 0.0


class Tuning(ABC, Generic[Config]):
    """A method's training of all layers together, after the last block.

    Attributes:
        settings: class of the configuration keys that it reads in addition to samples and batch size.
    """

    settings: type[Config]

    @abstractmethod
    def steps(self, settings: Settings) -> int:
        """Number of steps according to the ``rounding`` section; 0: no tuning."""

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
        rest: Mapping[str, Tensor] | None = None,
    ) -> Trained:
        """Train all compressed layers together; arguments as for ``rounding.finetune.tune``."""


METHODS: Registry[RoundingMethod[Any]] = Registry("rounding method")
