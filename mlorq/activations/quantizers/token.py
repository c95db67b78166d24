"""Evenly spaced levels over the range of each token, found while the model runs (METHOD 8).

``s = c (max x - min x) / (2^b - 1)``, and the levels span ``[c min x, c max x]`` along the axis that the product sums
over, with one share ``c ≤ 1`` for all tokens. At run time this costs the least and the largest value of every token
before its codes can be written; static ranges cost nothing. The integer product is multiplied by the token's scale
afterwards, as by a static one. A token may be rotated first and the result turned back: the columns of trellis codes
are stored in that basis, and other weights can be; to rotate queries and keys alike does not change their product.
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

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # values of c tried


class TokenQuantizer(ActivationQuantizer):
    """Evenly spaced levels, one range per token.

    Args:
        bits: bit-width of the codes.
        share: c, a scalar: the part of a token's range that its levels span.
        axis: of a token's numbers, -1 or -2.
        rotation: seed of the transform of a token before it is quantized (``codecs.rotation``); None: none.
    """

    name = "token"
    learned = ("share",)

    share: Tensor

    def __init__(self, bits: int, share: Tensor, axis: int = -1, rotation: int | None = None) -> None:
        super().__init__(bits)
        self.axis = axis
        self.rotation = rotation
        self.register_buffer("share", share.float())

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

    def _turned(self, x: Tensor) -> Tensor:
        return self._along(x, back=False)

    def _turned_back(self, x: Tensor) -> Tensor:
        return self._along(x, back=True)

    def _along(self, x: Tensor, *, back: bool) -> Tensor:
        if self.rotation is None:
            return x
        return _rotated(x.movedim(self.axis, -1), self.rotation, back=back).movedim(-1, self.axis)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least level and distance of levels, with one entry along ``axis``."""
        low, high = x.amin(self.axis, keepdim=True), x.amax(self.axis, keepdim=True)
        step = self.share * (high - low) / self.levels
        return self.share * low, step.clamp(min=torch.finfo(torch.float32).tiny)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "axis": self.axis, "rotation": self.rotation}

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> TokenQuantizer:
        axis = description["axis"]
        if axis not in (-1, -2):
            raise ValueError(f"a quantizer of tokens has the axis {axis!r:.60} instead of -1 or -2")
        seed = description["rotation"]
        if seed is not None and not (type(seed) is int and 0 <= seed < 2**31):
            raise ValueError(f"a quantizer of tokens has the rotation {seed!r:.60} instead of a seed")
        return cls(int(description["bits"]), (tensors or {"share": torch.ones(())})["share"], axis, seed)


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


def fit_tokens(tokens: Tensor, bits: int, axis: int = -1, rotation: int | None = None) -> TokenQuantizer:
    """The quantizer of least squared error over ``SHARES``.

    Args:
        tokens: ``(tokens, channels)``.
        bits: bit-width of the codes.
        axis: of a token's numbers in the tensor to be quantized.
        rotation: seed of the transform; None: none.
    """
    tried = [TokenQuantizer(bits, torch.tensor(share), -1, rotation).to(tokens.device) for share in SHARES]
    best = min(tried, key=lambda quantizer: quantizer.squared_error(tokens.float()))
    return TokenQuantizer(bits, best.share, axis, rotation)


QUANTIZER_KINDS.register(TokenQuantizer)
