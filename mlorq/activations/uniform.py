"""``uniform``: one range per tensor (METHOD 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.activations.method import ActivationMethod
from mlorq.activations.settings import ActivationSettings

if TYPE_CHECKING:
    from mlorq.activations.quantizers import ActivationQuantizer
    from mlorq.activations.survey import Observed


class Uniform(ActivationMethod[ActivationSettings]):
    """``q = clamp(round(x / s + z), 0, 2^b - 1)`` for every tensor, with the range of least squared error."""

    name = "uniform"
    about = "one range per tensor"
    settings = ActivationSettings

    def quantizer_for(
        self, observed: Observed, bits: int, settings: ActivationSettings, *, by_channel: bool
    ) -> ActivationQuantizer:
        from mlorq.activations.quantizers import fit_uniform

        return fit_uniform(observed.values, bits, settings.percentiles)
