"""The base class of activation quantizers, and the registry of their kinds (METHOD 8)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mlorq.registry import Registry, Settings


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """x rounded, with the gradient of x (straight-through estimator)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.round()
    found: Tensor = _RoundThrough.apply(x)  # type: ignore[no-untyped-call]
    return found


class ActivationQuantizer(nn.Module, ABC):
    """A quantizer in a forward pass, with straight-through gradients for values in range.

    A kind is a subclass. Its parameters are buffers, which checkpoints store as tensors; ``describe`` gives the rest.

    Attributes:
        name: the kind, as in descriptions.
        bits: bit-width of the codes.
        enabled: whether it quantizes; if not, it returns its input.
        drop: share of entries that stay float, chosen at random in every call (QDrop, arXiv 2203.05740); only for
            training, otherwise 0.
        generator: source of the randomness of ``drop``; None: torch's default.
        learned: names of the buffers that training may scale: positive numbers such as scales.
        learning: whether they are being trained; only then do results depend on them differentiably.
    """

    name: ClassVar[str]
    learned: tuple[str, ...] = ()
    settings: ClassVar[type[Settings]] = Settings  # none: methods choose kinds, configurations do not

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.enabled = True
        self.drop = 0.0
        self.generator: torch.Generator | None = None
        self.learning = False

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """x quantized, in its own dtype."""
        if not self.enabled:
            return x
        wide = x.float()
        if self.learning and torch.is_grad_enabled():
            found = self.differentiable(wide)
        elif torch.is_grad_enabled() and x.requires_grad:
            inside, found = self.rounded(wide)
            found = inside + (found - inside).detach()
        else:
            found = self.quantized(wide)
        if self.drop:
            chance = torch.rand(wide.shape, generator=self.generator).to(wide.device)
            found = torch.where(chance < self.drop, wide, found)
        return found.to(x.dtype)

    @abstractmethod
    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x clamped to the range, and x quantized; both float32 of the shape of x."""

    def quantized(self, x: Tensor) -> Tensor:
        """x quantized, float32: the second result of ``rounded``, which some kinds have for less work."""
        return self.rounded(x)[1]

    def differentiable(self, x: Tensor) -> Tensor:
        """x quantized, float32, differentiable by x and the buffers in ``learned`` (LSQ, arXiv 1902.08153)."""
        inside, found = self.rounded(x)
        return inside + (found - inside).detach()

    def squared_error(self, x: Tensor) -> float:
        """``Σ (x̄ - x)²`` over all entries of x."""
        return float((self.quantized(x) - x).double().square().sum())

    def hook(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook that quantizes a module's first argument, by position or keyword."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {name: self(value) for name, value in kwargs.items()}

    def describe(self) -> dict[str, Any]:
        """The arguments of ``build`` beside the tensors, as JSON: ``{"kind": …, "bits": …}`` and keys of the kind."""
        return {"kind": self.name, "bits": self.bits}

    @classmethod
    @abstractmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> Self:
        """The quantizer of a description.

        Args:
            description: result of ``describe``.
            tensors: its buffers by name; None: blank ones of the same shapes.
        """


QUANTIZER_KINDS: Registry[type[ActivationQuantizer]] = Registry("activation quantizer")


def build(description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> ActivationQuantizer:
    """A quantizer from its description.

    Args:
        description: result of ``ActivationQuantizer.describe``.
        tensors: its buffers by name; None: blank ones, to be filled by a state dict.

    Raises:
        ValueError: the kind is unknown.
    """
    kind = description["kind"]
    if kind not in QUANTIZER_KINDS:
        raise ValueError(f"unknown activation quantizer {kind!r}; {QUANTIZER_KINDS.hint(kind)}")
    return QUANTIZER_KINDS[kind].built(description, tensors or None)
