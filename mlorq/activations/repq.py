"""``repq``: ranges per channel folded into LayerNorms, log-√2 after softmax (RepQ-ViT, arXiv 2212.08254; METHOD 8).

LayerNorms are folded if only layers read them (formula: ``folding``). Other tensors whose channels differ
widely, such as one that a LayerNorm and a residual share, keep one range per channel at the layers' inputs. Attention's
probabilities get ``q = clamp(round(-log2(x / s) / τ), 0, 2^b - 1)`` with ``τ = 1/2``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.activations.method import ActivationMethod
from mlorq.activations.settings import ActivationSettings

if TYPE_CHECKING:
    from mlorq.activations.quantizers import ActivationQuantizer
    from mlorq.activations.survey import Observed

LOG_SQRT2 = (0.5,)  # τ


class RepQ(ActivationMethod[ActivationSettings]):
    """RepQ-ViT."""

    name = "repq"
    about = "ranges per channel folded into LayerNorms, log-sqrt2 after softmax"
    settings: type[ActivationSettings] = ActivationSettings
    folds_norms = True
    per_channel = True

    def quantizer_for(
        self, observed: Observed, bits: int, settings: ActivationSettings, *, by_channel: bool
    ) -> ActivationQuantizer:
        from mlorq.activations.quantizers import fit_log, fit_ranges

        if observed.sums_to_one:
            return fit_log(observed.values, bits, LOG_SQRT2)
        return fit_ranges(observed.values, bits, settings.percentiles, by_channel=by_channel)
