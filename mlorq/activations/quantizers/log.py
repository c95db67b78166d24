"""Logarithmic levels: ``q = clamp(round(-log2((x + h) / s) / τ), 0, 2^b - 1)``, ``x̄ = s · 2^(-τ q) - h`` (METHOD 8).

``τ = 1/2`` and ``h = 0`` give RepQ-ViT's log-√2 (arXiv 2212.08254); a searched τ gives AdaLog's adaptive base (arXiv
2407.12951), and h shifts the outputs of GELU above zero. The last code stands for zero, for which the published log-√2
has no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.activations.quantizers.base import QUANTIZER_KINDS, ActivationQuantizer

RANGES = (1.0, 0.99999, 0.9999, 0.999, 0.99)  # quantiles tried as s


class LogQuantizer(ActivationQuantizer):
    """Levels that halve every ``1 / τ`` codes.

    Args:
        bits: bit-width of the codes.
        scale: s, the largest level, a scalar.
        step: τ, a scalar.
        shift: h, a scalar.
    """

    name = "log"

    scale: Tensor
    step: Tensor
    shift: Tensor

    def __init__(self, bits: int, scale: Tensor, step: Tensor, shift: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("scale", scale.float())
        self.register_buffer("step", step.float())
        self.register_buffer("shift", shift.float())

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shifted = (x + self.shift).clamp(min=0)
        code = (-(shifted / self.scale).log2() / self.step).round_()
        found = self.scale * torch.exp2(-self.step * code.clamp(min=0))
        found = torch.where(code < self.levels, found, torch.zeros_like(found))
        return torch.minimum(shifted, self.scale) - self.shift, found - self.shift

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> LogQuantizer:
        found = tensors or {name: torch.ones(()) for name in ("scale", "step", "shift")}
        return cls(int(description["bits"]), found["scale"], found["step"], found["shift"])


def fit_log(values: Tensor, bits: int, steps: Sequence[float], shift: float = 0.0) -> LogQuantizer:
    """The logarithmic quantizer of least squared error over ranges s and steps τ.

    Args:
        values: any shape, none below ``-shift``.
        bits: bit-width of the codes.
        steps: values of τ tried.
        shift: h.
    """
    flat = values.reshape(-1).float()
    ordered = flat.sort().values
    best, least = None, float("inf")
    for share in RANGES:
        top = ordered[round(share * (len(ordered) - 1))] + shift
        for step in steps:
            quantizer = LogQuantizer(
                bits, top.clamp(min=torch.finfo(torch.float32).tiny), torch.tensor(step), torch.tensor(shift)
            ).to(flat.device)
            error = quantizer.squared_error(flat)
            if error < least:
                best, least = quantizer, error
    assert best is not None
    return best


QUANTIZER_KINDS.register(LogQuantizer)
