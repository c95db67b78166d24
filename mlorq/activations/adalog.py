"""``adalog``: logarithmic quantizers with searched base after softmax and GELU (AdaLog, arXiv 2407.12951; METHOD 8).

Probabilities get ``q = clamp(round(-log2(x / s) / τ), 0, 2^b - 1)`` with the τ of least squared error; outputs of GELU
get the same with ``x + 0.17`` for x, if its error is smaller than that of a uniform range. LayerNorms and other tensors
are treated as in RepQ-ViT. Ranges of linear layers' inputs are searched on tokens drawn in proportion to their
importance (METHOD 7, ``search.token_weights``), so that tokens on which the output depends count more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.activations.method import ActivationMethod
from mlorq.activations.settings import ActivationSettings

if TYPE_CHECKING:
    from mlorq.activations.quantizers import ActivationQuantizer
    from mlorq.activations.survey import Observed

LOG_STEPS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # values of τ tried


class AdaLog(ActivationMethod[ActivationSettings]):
    """AdaLog, with RepQ-ViT's LayerNorms and weighted tokens."""

    name = "adalog"
    about = "ranges per channel folded into LayerNorms, searched logarithms after softmax and GELU, weighted tokens"
    settings = ActivationSettings
    weighs_tokens = True
    folds_norms = True
    per_channel = True

    def quantizer_for(
        self, observed: Observed, bits: int, settings: ActivationSettings, *, by_channel: bool
    ) -> ActivationQuantizer:
        from mlorq.activations.quantizers import fit_log, fit_ranges, fit_uniform
        from mlorq.activations.survey import GELU_LEAST

        values = observed.values
        if observed.sums_to_one:
            return fit_log(values, bits, LOG_STEPS)
        if observed.is_gelu_output:
            uniform = fit_uniform(values, bits, settings.percentiles)
            log = fit_log(values, bits, LOG_STEPS, -GELU_LEAST)
            return log if log.squared_error(values) < uniform.squared_error(values) else uniform
        return fit_ranges(values, bits, settings.percentiles, by_channel=by_channel)
