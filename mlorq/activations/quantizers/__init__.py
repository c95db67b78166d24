"""Quantizers of activations, and the fit of their ranges to samples (METHOD 8).

One file per kind: the module, its description in checkpoints, and its fit. A further kind derives from
``ActivationQuantizer`` and is registered in ``QUANTIZER_KINDS``; ``build`` makes one from its description.
"""

from mlorq.activations.quantizers.base import QUANTIZER_KINDS, ActivationQuantizer, build
from mlorq.activations.quantizers.log import LogQuantizer, fit_log
from mlorq.activations.quantizers.probabilities import ProbabilityQuantizer, fit_probabilities
from mlorq.activations.quantizers.token import TokenQuantizer, fit_tokens
from mlorq.activations.quantizers.uniform import UniformQuantizer, fit_channels, fit_heads, fit_ranges, fit_uniform

__all__ = [
    "QUANTIZER_KINDS",
    "ActivationQuantizer",
    "LogQuantizer",
    "ProbabilityQuantizer",
    "TokenQuantizer",
    "UniformQuantizer",
    "build",
    "fit_channels",
    "fit_heads",
    "fit_log",
    "fit_probabilities",
    "fit_ranges",
    "fit_tokens",
    "fit_uniform",
]
