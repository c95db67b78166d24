"""Methods of quantizing activations: which tensors get which quantizer (METHOD 8).

A method is one file: a subclass of ``ActivationMethod`` that says what it needs, and fits a quantizer to what was
observed of one tensor. All else is the same for all methods: where activations are, their bit-widths, folding, and how
quantizers run in a module (``calibrate``, ``folding``, ``plan``). A method with keys of its own derives a class from
``ActivationSettings`` that adds them:

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
    """One method.

    Attributes:
        name: as ``activations.method`` has it.
        about: what it does, for the description of that key.
        settings: its keys, the common ones and its own.
        weighs_tokens: values are observed on tokens drawn with the chances that their importance gives them.
        folds_norms: LayerNorms are folded into the layers that read them, where only layers do.
        per_channel: inputs of linear layers whose channels differ widely may keep one range per channel.
    """

    name: str
    about: str
    settings: type[Own]
    weighs_tokens: bool = False
    folds_norms: bool = False
    per_channel: bool = False

    @abstractmethod
    def quantizer_for(self, observed: Observed, bits: int, settings: Own, *, by_channel: bool) -> ActivationQuantizer:
        """The quantizer of one tensor that no LayerNorm is folded for.

        Args:
            observed: what was seen of the tensor: its values, and whether they are probabilities or outputs of GELU.
            bits: code width.
            settings: of the run.
            by_channel: the tensor's channels differ widely; always False unless ``per_channel``.
        """


ACTIVATION_METHODS: Registry[ActivationMethod[Any]] = Registry("activation quantization method")
