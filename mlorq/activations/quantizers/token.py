"""Evenly spaced levels over the range of each token, found while the model runs (METHOD 8).

``s = c (max x - min x) / (2^b - 1)``, and the levels span ``[c min x, c max x]`` along the axis that the product sums
over, with one share ``c ≤ 1`` for all tokens. At run time this costs the least and the largest value of every token
before its codes can be written; static ranges cost nothing. The integer product is multiplied by the token's scale
afterwards, as by a static one. A token may be transformed first and the result transformed back,

    ``y = Q (d ∘ (x - μ))``,  ``x̄ = μ + Qᵀ ȳ / d``,

with a rotation Q. The reader's weight W makes of equal errors of all ``y_i`` the error ``tr(Σ) tr(H) / n`` with
``Σ_ij = E (x - μ)_i (x - μ)_j d_i d_j`` and ``H = diag(1/d) Wᵀ W diag(1/d)``. By Cauchy and Schwarz the gains
``d_i² = (‖W_i‖² / E (x - μ)_i²)^½`` make it least, with ``W_i`` the columns of W: SmoothQuant's migration (arXiv
2211.10438) with strength ½ and second moments in the place of maxima.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mlorq.activations.quantizers.base import QUANTIZER_KINDS, ActivationQuantizer, round_through
from mlorq.codecs.rotation import rotate, rotate_back
from mlorq.memory import block_width

LARGEST_GAIN = 1e3  # a channel that never changes, or that no weight reads, would have 0 or infinity
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # values of c tried


class TokenQuantizer(ActivationQuantizer):
    """Evenly spaced levels, one range per token.

    Args:
        bits: bit-width of the codes.
        share: c, a scalar: the part of a token's range that its levels span.
        axis: of a token's numbers, -1 or -2.
        rotation: seed of Q (``codecs.rotation``); None: no rotation.
        gain: d, ``(channels,)``, positive; None: ones.
        shift: μ, ``(channels,)``; None: zeros.
    """

    name = "token"

    share: Tensor
    gain: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        bits: int,
        share: Tensor,
        axis: int = -1,
        rotation: int | None = None,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__(bits)
        self.axis = axis
        self.rotation = rotation
        self.learned = ("share",) if gain is None else ("share", "gain")
        self.register_buffer("share", share.float())
        self.register_buffer("gain", None if gain is None else gain.float())
        self.register_buffer("shift", None if shift is None else shift.float())

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned = self._turned(x)
        low, step = self._range(turned)
        position = ((turned - low) / step).clamp(0, self.levels)
        return self._turned_back(position * step + low), self._turned_back(position.round() * step + low)

    def quantized(self, x: Tensor) -> Tensor:
        turned = self._turned(x)
        low, step = self._range(turned)
        return self._turned_back(((turned - low) / step).clamp(0, self.levels).round() * step + low)

    def differentiable(self, x: Tensor) -> Tensor:
        turned = self._turned(x)
        low, step = self._range(turned.detach())
        return self._turned_back(round_through(((turned - low) / step).clamp(0, self.levels)) * step + low)

    def steps(self, x: Tensor) -> Tensor:
        """The distances of the levels of all tokens, with one entry along ``axis``."""
        return self._range(self._turned(x))[1]

    def _turned(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        if self.shift is not None:
            x = x - self.shift
        if self.gain is not None:
            x = x * self.gain
        if self.rotation is not None:
            x = _rotated(x, self.rotation, back=False)
        return x.movedim(-1, self.axis)

    def _turned_back(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        if self.rotation is not None:
            x = _rotated(x, self.rotation, back=True)
        if self.gain is not None:
            x = x / self.gain
        if self.shift is not None:
            x = x + self.shift
        return x.movedim(-1, self.axis)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least level and distance of levels, with one entry along ``axis``."""
        low, high = x.amin(self.axis, keepdim=True), x.amax(self.axis, keepdim=True)
        step = self.share * (high - low) / self.levels
        return self.share * low, step.clamp(min=torch.finfo(torch.float32).tiny)

    def describe(self) -> dict[str, Any]:
        channels = None if self.gain is None else len(self.gain)
        return {**super().describe(), "axis": self.axis, "rotation": self.rotation, "channels": channels}

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> TokenQuantizer:
        axis = description["axis"]
        if axis not in (-1, -2):
            raise ValueError(f"a quantizer of tokens has the axis {axis!r:.60} instead of -1 or -2")
        seed = description["rotation"]
        if seed is not None and not (type(seed) is int and 0 <= seed < 2**31):
            raise ValueError(f"a quantizer of tokens has the rotation {seed!r:.60} instead of a seed")
        channels = description.get("channels")
        blank = {"share": torch.ones(())}
        if channels is not None:
            blank |= {"gain": torch.ones(int(channels)), "shift": torch.zeros(int(channels))}
        found = tensors or blank
        return cls(int(description["bits"]), found["share"], axis, seed, found.get("gain"), found.get("shift"))


def _rotated(x: Tensor, seed: int, *, back: bool) -> Tensor:
    """``x Q``, or ``x Qᵀ``, along the last axis; the product is faster here than the passes of the fast transform."""
    size = x.shape[-1]
    if (width := block_width(size)) < size:
        found = (rotate_back if back else rotate)(x.flatten(0, -2), seed, width)
        return found.reshape(x.shape)
    matrix = _matrix(size, seed, str(x.device))
    # Not by ``@``: inside attention such products are taken for those of queries, keys and values.
    return linear(x, matrix if back else matrix.T)


@lru_cache(maxsize=16)
def _matrix(size: int, seed: int, device: str) -> Tensor:
    """Q, ``(size, size)`` float32."""
    with torch.no_grad():
        return rotate(torch.eye(size, dtype=torch.float64), seed).float().to(device)


def fit_tokens(
    tokens: Tensor, bits: int, axis: int = -1, rotation: int | None = None, columns: Tensor | None = None
) -> TokenQuantizer:
    """The quantizer of least squared error over ``SHARES``.

    Args:
        tokens: ``(tokens, channels)``.
        bits: bit-width of the codes.
        axis: of a token's numbers in the tensor to be quantized.
        rotation: seed of the rotation; None: none.
        columns: ``‖W_i‖²``, ``(channels,)``, of the weights that multiply the tokens, for gains and shifts; None:
            neither.
    """
    tokens = tokens.float()
    gain = shift = None
    if columns is not None:
        shift = tokens.mean(0)
        gain = best_gain(columns.to(tokens.device), (tokens - shift).square().mean(0))
    weights = torch.ones(tokens.shape[1]) if columns is None else columns

    def error(quantizer: TokenQuantizer) -> float:
        by_channel = (quantizer.quantized(tokens) - tokens).double().square().sum(0)
        return float(by_channel @ weights.to(tokens.device).double())

    tried = [TokenQuantizer(bits, torch.tensor(share), -1, rotation, gain, shift) for share in SHARES]
    best = min((one.to(tokens.device) for one in tried), key=error)
    best.axis = axis
    return best


def best_gain(columns: Tensor, variances: Tensor) -> Tensor:
    """``d = (‖W_i‖² / v_i)^¼``, with mean square one, between ``1 / LARGEST_GAIN`` and ``LARGEST_GAIN``.

    Args:
        columns: ``‖W_i‖²``, ``(channels,)``.
        variances: v, ``(channels,)``.
    """
    tiny = torch.finfo(torch.float32).tiny
    gain = (columns.double().clamp(min=tiny) / variances.double().clamp(min=tiny)).pow(0.25)
    return (gain / gain.square().mean().sqrt()).clamp(1 / LARGEST_GAIN, LARGEST_GAIN).float()


QUANTIZER_KINDS.register(TokenQuantizer)
