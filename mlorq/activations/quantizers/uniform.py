"""Evenly spaced levels: ``q = clamp(round(x / s + z), 0, 2^b - 1)``, ``x̄ = (q - z) s`` (METHOD 8).

One scale and zero-point for all values, or one per channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.activations.quantizers.base import QUANTIZER_KINDS, ActivationQuantizer, round_through
from mlorq.fitting.scale_search import search_quantizer

LEAST_SPREAD = 1e-2  # least scale of a channel, relative to the mean: keeps dead channels in the range of float32


class UniformQuantizer(ActivationQuantizer):
    """Evenly spaced levels.

    Args:
        bits: bit-width of the codes.
        scale: s, a scalar, ``(channels,)`` of the last axis, or ``(heads, 1, channels)``; positive.
        zero: z, same shape; need not be an integer.
    """

    name = "uniform"
    learned = ("scale",)

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, scale: Tensor, zero: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", zero.float())

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        position = (x / self.scale + self.zero).clamp(0, self.levels)
        return (position - self.zero) * self.scale, (position.round() - self.zero) * self.scale

    def differentiable(self, x: Tensor) -> Tensor:
        position = (x / self.scale + self.zero).clamp(0, self.levels)
        return (round_through(position) - self.zero) * self.scale

    def describe(self) -> dict[str, Any]:
        shape = list(self.scale.shape)
        return {**super().describe(), "channels": shape if len(shape) > 1 else shape[0] if shape else None}

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> UniformQuantizer:
        channels = description.get("channels")
        shape = [] if channels is None else channels if isinstance(channels, list) else [int(channels)]
        blank = torch.ones([int(size) for size in shape])
        found = tensors or {"scale": blank, "zero": blank.clone()}
        return cls(int(description["bits"]), found["scale"], found["zero"])


def fit_uniform(values: Tensor, bits: int, percentiles: Sequence[float]) -> UniformQuantizer:
    """One range for all values: the percentile pair of least squared error.

    Args:
        values: any shape.
        bits: bit-width of the codes.
        percentiles: upper percentiles p of the ranges (1-p, p) tried.
    """
    found = search_quantizer(values.reshape(1, -1), bits, percentiles)
    return UniformQuantizer(bits, found.scale[0], found.zero_point[0])


def fit_channels(tokens: Tensor, bits: int, percentiles: Sequence[float]) -> UniformQuantizer:
    """One range per channel of ``(tokens, channels)``, each searched as in ``fit_uniform``."""
    found = search_quantizer(tokens.T.contiguous(), bits, percentiles)
    least = LEAST_SPREAD * found.scale.mean()
    return UniformQuantizer(bits, found.scale.clamp(min=float(least)), found.zero_point)


def fit_heads(vectors: Tensor, bits: int, percentiles: Sequence[float], heads: tuple[int, int]) -> UniformQuantizer:
    """One range per head and channel of ``(…, heads, tokens, channels)``.

    Args:
        vectors: ``(tokens, heads · channels)``.
        bits: bit-width of the codes.
        percentiles: upper percentiles p of the ranges (1-p, p) tried.
        heads: numbers of heads and of channels of a head.
    """
    found = fit_channels(vectors, bits, percentiles)
    shape = (heads[0], 1, heads[1])
    return UniformQuantizer(bits, found.scale.reshape(shape), found.zero.reshape(shape))


def fit_ranges(values: Tensor, bits: int, percentiles: Sequence[float], *, by_channel: bool) -> UniformQuantizer:
    """``fit_channels`` if ``by_channel``, else ``fit_uniform``."""
    return (fit_channels if by_channel else fit_uniform)(values, bits, percentiles)


QUANTIZER_KINDS.register(UniformQuantizer)
