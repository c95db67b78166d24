"""Quantizers of activations, and how their ranges are found on samples of what they will see (METHOD 8).

- ``UniformQuantizer``: ``q = clamp(round(x / s + z), 0, 2^b - 1)``, ``x̂ = (q - z) s``; one scale for all, or one a
  channel.
- ``LogQuantizer``: ``q = clamp(round(-log2((x + h) / s) / τ), 0, 2^b - 1)``, ``x̂ = s · 2^(-τ q) - h``. With
  ``τ = 1/2`` and ``h = 0`` it is RepQ-ViT's log-√2 (arXiv 2212.08254); with τ searched it is AdaLog's adaptive base
  (arXiv 2407.12951), and h shifts the outputs of GELU above zero. The last code stands for zero, which the published
  log-√2 has no code for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.fitting.scale_search import search_quantizer

LOG_SQRT2 = (0.5,)
LOG_STEPS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # τ that are tried where the base is searched
LOG_RANGES = (1.0, 0.99999, 0.9999, 0.999, 0.99)
LEAST_SPREAD = 1e-2  # of a channel's scale, relative to the mean of all: dead channels stay in range of float32


class ActivationQuantizer(nn.Module):
    """A quantizer in a forward pass; gradients pass where a value is in range.

    Attributes:
        bits: code width.
        enabled: whether it does anything.
        drop: share of the entries that stay as they are, chosen at random in every call (QDrop, arXiv 2203.05740);
            only for training, and 0 otherwise.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.enabled = True
        self.drop = 0.0
        self.generator: torch.Generator | None = None

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        wide = x.float()
        inside, found = self.rounded(wide)
        if torch.is_grad_enabled() and x.requires_grad:
            found = inside + (found - inside).detach()
        if self.drop:
            chance = torch.rand(wide.shape, generator=self.generator).to(wide.device)
            found = torch.where(chance < self.drop, wide, found)
        return found.to(x.dtype)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x held in range, and x quantized."""
        raise NotImplementedError

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook that quantizes a module's first argument."""
        return (self(args[0]), *args[1:])

    def describe(self) -> dict[str, Any]:
        """What ``build`` needs beside the tensors."""
        raise NotImplementedError


class UniformQuantizer(ActivationQuantizer):
    """Evenly spaced levels.

    Args:
        bits: code width.
        scale: s, a scalar or ``(channels,)`` of the last axis; positive.
        zero: z, same shape; need not be whole.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, scale: Tensor, zero: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", zero.float())

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        position = (x / self.scale + self.zero).clamp(0, self.levels)
        return (position - self.zero) * self.scale, (position.round() - self.zero) * self.scale

    def describe(self) -> dict[str, Any]:
        return {"kind": "uniform", "bits": self.bits, "channels": self.scale.numel() if self.scale.dim() else None}


class LogQuantizer(ActivationQuantizer):
    """Levels that halve every ``1 / τ`` codes.

    Args:
        bits: code width.
        scale: s, the largest level, a scalar.
        step: τ, a scalar.
        shift: h, a scalar.
    """

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

    def describe(self) -> dict[str, Any]:
        return {"kind": "log", "bits": self.bits}


def build(description: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> ActivationQuantizer:
    """A quantizer from its description; without tensors its numbers are yet to be filled in.

    Raises:
        ValueError: the kind is unknown.
    """
    bits, kind = int(description["bits"]), description["kind"]
    if kind == "uniform":
        channels = description.get("channels")
        blank = torch.ones(()) if channels is None else torch.ones(int(channels))
        found = tensors or {"scale": blank, "zero": blank.clone()}
        return UniformQuantizer(bits, found["scale"], found["zero"])
    if kind == "log":
        found = tensors or {name: torch.ones(()) for name in ("scale", "step", "shift")}
        return LogQuantizer(bits, found["scale"], found["step"], found["shift"])
    raise ValueError(f"unknown activation quantizer {kind!r}")


# -- ranges -------------------------------------------------------------------------------------------------------


def fit_uniform(values: Tensor, bits: int, percentiles: Sequence[float]) -> UniformQuantizer:
    """One range for all values: of the percentile pairs the one with the least squared error.

    Args:
        values: any shape.
        bits: code width.
        percentiles: upper percentiles p of the ranges (1-p, p) tried.
    """
    found = search_quantizer(values.reshape(1, -1), bits, percentiles)
    return UniformQuantizer(bits, found.scale[0], found.zero_point[0])


def fit_channels(tokens: Tensor, bits: int, percentiles: Sequence[float]) -> UniformQuantizer:
    """One range a channel, ``(tokens, channels)``, found as in ``fit_uniform``."""
    found = search_quantizer(tokens.T.contiguous(), bits, percentiles)
    least = LEAST_SPREAD * found.scale.mean()
    return UniformQuantizer(bits, found.scale.clamp(min=float(least)), found.zero_point)


def fit_log(values: Tensor, bits: int, steps: Sequence[float], shift: float = 0.0) -> LogQuantizer:
    """Range and step τ with the least squared error.

    Args:
        values: any shape, none below ``-shift``.
        bits: code width.
        steps: τ that are tried.
        shift: h.
    """
    flat = values.reshape(-1).float()
    ordered = flat.sort().values
    best, least = None, float("inf")
    for share in LOG_RANGES:
        top = ordered[round(share * (len(ordered) - 1))] + shift
        for step in steps:
            quantizer = LogQuantizer(
                bits, top.clamp(min=torch.finfo(torch.float32).tiny), torch.tensor(step), torch.tensor(shift)
            ).to(flat.device)
            error = float((quantizer.rounded(flat)[1] - flat).double().square().sum())
            if error < least:
                best, least = quantizer, error
    assert best is not None
    return best
