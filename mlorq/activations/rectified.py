"""``rectified``: as ``folded``, with ReLU in place of GELU (APHQ-ViT, arXiv 2504.02508; METHOD 8).

The numerics are in ``rectify``. The float model is another one afterwards, whose outputs are close to those of the
given one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.activations.method import ActivationMethod
from mlorq.activations.settings import RectifyingSettings

if TYPE_CHECKING:
    from mlorq.activations.quantizers import ActivationQuantizer
    from mlorq.activations.survey import Observed


class Rectified(ActivationMethod[RectifyingSettings]):
    """One range per tensor, after GELU became ReLU and LayerNorms were folded."""

    name = "rectified"
    about = "as folded, with ReLU in place of GELU"
    settings = RectifyingSettings
    folds_norms = True
    rectifies = True

    def quantizer_for(
        self, observed: Observed, bits: int, settings: RectifyingSettings, *, by_channel: bool
    ) -> ActivationQuantizer:
        from mlorq.activations.quantizers import fit_uniform

        return fit_uniform(observed.values, bits, settings.percentiles)
