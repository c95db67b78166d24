"""Logarithmic codes of probabilities that are normalised over each row (METHOD 8).

``q = clamp(round(-log2(p / max p) / τ), 0, 2^b - 1)``, ``v = 2^(-τ q)`` and 0 for the last code, ``p̄ = v / Σ v`` along
the last axis. A row needs no scale: the products ``Σ v_j x_j`` are divided by ``Σ v_j``, as softmax divides its
exponentials by their sum (FQ-ViT, arXiv 2111.13824, takes logarithmic codes of them too; a searched τ is AdaLog's,
arXiv 2407.12951). With one scale for all rows, flat rows get few levels, and a row's sum is not one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.activations.quantizers.base import QUANTIZER_KINDS, ActivationQuantizer

LEAST_STEP = 1e-20  # of a token whose values are all the same


class ProbabilityQuantizer(ActivationQuantizer):
    """Probabilities along the last axis, as codes whose values sum to one.

    Args:
        bits: bit-width of the codes.
        step: τ, a scalar; the levels halve every ``1 / τ`` codes.
    """

    name = "probabilities"

    step: Tensor

    def __init__(self, bits: int, step: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("step", step.float())

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tiny = torch.finfo(torch.float32).tiny
        largest = x.amax(-1, keepdim=True).clamp(min=tiny)
        # Below the smallest normal number the logarithm is no longer exact, and the code is the last one anyway.
        code = (-(x / largest).clamp(min=tiny).log2() / self.step).round()
        values = torch.where(code < self.levels, torch.exp2(-self.step * code), torch.zeros_like(x))
        return x, values / values.sum(-1, keepdim=True)

    def carrying(self, x: Tensor, steps: Tensor) -> Tensor:
        """x quantized if the product's right operand has codes with a step for each of its tokens.

        That step varies along the axis of the sum, so that the codes of x include it: they are those of ``x_j s_j``,
        whose sum over a row, a by-product of softmax, takes the place of one.

        Args:
            x: probabilities, ``(…, rows, tokens)``.
            steps: s, ``(…, tokens, 1)``.
        """
        if not self.enabled:
            return x
        steps = steps.mT.clamp(min=LEAST_STEP).to(x.dtype)
        carried = x * steps
        total = carried.sum(-1, keepdim=True)
        found: Tensor = self(carried / total) * total / steps
        return found

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> ProbabilityQuantizer:
        return cls(int(description["bits"]), (tensors or {"step": torch.ones(())})["step"])


def fit_probabilities(rows: Tensor, bits: int, steps: Sequence[float]) -> ProbabilityQuantizer:
    """The quantizer of least squared error over steps τ.

    Args:
        rows: ``(rows, length)``, each with sum one.
        bits: bit-width of the codes.
        steps: values of τ tried.
    """
    tried = [ProbabilityQuantizer(bits, torch.tensor(step)).to(rows.device) for step in steps]
    return min(tried, key=lambda quantizer: quantizer.squared_error(rows.float()))


QUANTIZER_KINDS.register(ProbabilityQuantizer)
