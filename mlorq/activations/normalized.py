"""``normalized``: as ``adalog``, with probabilities normalised over each row and values by channel (METHOD 8).

- Attention's probabilities: codes of each row relative to its largest one, whose values sum to one.
- Attention's values: one range per head and channel, which scales a column of the product.
- With ``ranges: token``: every token of a layer's input, of the queries, the keys and the values has its own range,
  found while the model runs. All of them are rotated first, by the transform that trellis codes apply to a weight's
  columns (``codecs.rotation``): without outlier channels the range of a token is narrow (QuaRot, arXiv 2404.00456).
  Inputs of layers are centred and their channels scaled before (``quantizers.token``), and turned back afterwards. The
  rotation of queries and keys can be folded into the layers that compute them, unless the model turns these by
  position, that of values into the layers before and after them; elsewhere the transform has to be paid for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mlorq.activations.adalog import AdaLog
from mlorq.activations.settings import ActivationSettings

if TYPE_CHECKING:
    from mlorq.activations.quantizers import ActivationQuantizer
    from mlorq.activations.survey import Observed

STEPS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0)  # values of τ tried
ROTATION = 0  # seed, the default one of trellis codes


class NormalizedSettings(ActivationSettings):
    """Keys of the method."""

    ranges: Literal["static", "token"] = Field(
        "static",
        description="static: ranges of the calibration data; token: of layers' inputs, queries, keys and values the "
        "range of each token, found while the model runs, after a rotation",
    )


class Normalized(AdaLog):
    """AdaLog with probabilities that sum to one, values by channel, and ranges per token as an option."""

    name = "normalized"
    about = "as adalog, with probabilities normalised over each row and values by channel"
    settings = NormalizedSettings

    def folds(self, settings: ActivationSettings) -> bool:
        return not _by_token(settings)  # a rotation does what folded ranges per channel do

    def quantizer_for(
        self, observed: Observed, bits: int, settings: ActivationSettings, *, by_channel: bool
    ) -> ActivationQuantizer:
        from mlorq.activations.quantizers import fit_heads, fit_probabilities, fit_tokens

        if observed.sums_to_one and observed.across is not None:
            return fit_probabilities(observed.vectors, bits, STEPS)
        if _by_token(settings) and observed.heads is not None:
            return fit_tokens(observed.vectors.unflatten(1, observed.heads).flatten(0, 1), bits, rotation=ROTATION)
        if observed.heads is not None:
            return fit_heads(observed.vectors, bits, settings.percentiles, observed.heads)
        if _by_token(settings) and observed.layers and observed.values.dim() == 2:
            return fit_tokens(observed.values, bits, rotation=ROTATION, columns=observed.columns)
        if _by_token(settings) and observed.across is not None:
            return fit_tokens(observed.vectors, bits, observed.across, ROTATION)
        return super().quantizer_for(observed, bits, settings, by_channel=by_channel)


def _by_token(settings: ActivationSettings) -> bool:
    return isinstance(settings, NormalizedSettings) and settings.ranges == "token"
