"""Activation quantization methods: which tensor gets which quantizer (METHOD 8).

A method is one file with a subclass of ``ActivationMethod`` that declares its needs and fits a quantizer to the
observations of one tensor. All methods share the rest: sites of activations, bit-widths, folding, and quantizers in a
module (``calibrate``, ``folding``, ``plan``). A method with further keys derives its settings from
``ActivationSettings``:

    class ClippedSettings(ActivationSettings):
        clip: float = Field(3.0, gt=0, description="largest value, in standard deviations")

    class Clipped(ActivationMethod[ClippedSettings]):
        name, about, settings = "clipped", "ranges of so many standard deviations", ClippedSettings

        def quantizer_for(self, observed, bits, settings, *, by_channel): ...

    ACTIVATION_METHODS.register(Clipped())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mlorq.activations.settings import ActivationSettings
from mlorq.registry import Registry

if TYPE_CHECKING:
    from mlorq.activations.quantizers import ActivationQuantizer
    from mlorq.activations.survey import Observed

Own = TypeVar("Own", bound=ActivationSettings)


class ActivationMethod(ABC, Generic[Own]):
    """One activation quantization method.

    Attributes:
        name: value of ``activations.method``.
        about: short description of the method, shown with that key.
        settings: class of its keys, common and own.
        weighs_tokens: values are observed on tokens drawn in proportion to their importance.
        folds_norms: LayerNorms are folded into the layers that read them, if only layers do.
        per_channel: inputs of linear layers whose channels differ widely may keep one range per channel.
        rectifies: GELU is replaced by ReLU before, and the layers around it are trained (``rectify``); its settings
            are then a subclass of ``RectifyingSettings``.
    """

    name: str
    about: str
    settings: type[Own]
    weighs_tokens: bool = False
    folds_norms: bool = False
    per_channel: bool = False
    rectifies: bool = False

    @abstractmethod
    def quantizer_for(self, observed: Observed, bits: int, settings: Own, *, by_channel: bool) -> ActivationQuantizer:
        """Fit the quantizer of one tensor that is not the output of a folded LayerNorm.

        Args:
            observed: observations of the tensor: values, and whether they are probabilities or outputs of GELU.
            bits: bit-width of the codes.
            settings: settings of the run.
            by_channel: whether the tensor's channels differ widely; always False unless ``per_channel``.
        """

    def folds(self, settings: Own) -> bool:
        """Whether LayerNorms are folded under these settings."""
        return self.folds_norms


ACTIVATION_METHODS: Registry[ActivationMethod[Any]] = Registry("activation quantization method")
