"""Quantizers of activations as QuantizeLinear and DequantizeLinear.

A uniform quantizer becomes this pair. Its range is enforced before if the codes are fewer than the integers, and its
zero-point is moved into a shift of the values if it is not one of the codes: ``x̄ = D(Q(x + h)) - h``. A linear layer
takes the last shift into its bias, ``x̄ Wᵀ + b = D(Q(x + h)) Wᵀ + (b - W h)``, so that its product is one of integers.
Other kinds stay the operators of their arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.activations.quantizers import UniformQuantizer

BYTE = 8  # bits of the integers; wider codes take 16


class QuantizeDequantize(nn.Module):
    """A uniform quantizer as one pair of operators, for exporters.

    Args:
        quantizer: the quantizer, of up to 16 bits.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero: Tensor
    shift: Tensor

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        scale, zero, levels = quantizer.scale.flatten(), quantizer.zero.flatten(), quantizer.levels
        if not quantizer.scale.dim():
            scale, zero = scale[0], zero[0]
        self.heads = tuple(quantizer.scale.shape) if quantizer.scale.dim() > 1 else None  # (heads, 1, channels)
        integers = torch.uint8 if quantizer.bits <= BYTE else torch.uint16
        fits = bool((zero == zero.round()).all() and (zero >= 0).all() and (zero <= levels).all())
        point = zero if fits else torch.zeros_like(zero)
        self.shifts = self.shifts_back = not fits
        self.clamps = quantizer.bits not in (BYTE, 2 * BYTE)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero", point.to(integers))
        self.register_buffer("shift", zero * scale)
        self.register_buffer("low", -point * scale)
        self.register_buffer("high", (levels - point) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """x quantized, float32."""
        if self.heads is None:
            return self._pair(x)
        # The operators know scales along one axis.
        joined = x.transpose(-3, -2).flatten(-2)
        found: Tensor = self._pair(joined).unflatten(-1, (self.heads[0], self.heads[2])).transpose(-3, -2)
        return found

    def _pair(self, x: Tensor) -> Tensor:
        if self.shifts:
            x = x + self.shift
        if self.clamps:
            x = torch.minimum(torch.maximum(x, self.low), self.high)
        found: Tensor = torch.ops.mlorq.quantize_dequantize(x, self.scale, self.zero, -1 if self.scale.dim() else 0)
        return found - self.shift if self.shifts_back else found

    def move_shift(self, layer: nn.Linear) -> None:
        """Move the last shift of a linear layer's input into its bias, which becomes ``b - W h``."""
        if self.shifts_back:
            moved = layer.weight.double() @ self.shift.double().expand(layer.in_features)
            bias = -moved if layer.bias is None else layer.bias.double() - moved
            layer.bias = nn.Parameter(bias.float(), requires_grad=False)
            self.shifts_back = False

    def hook(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook that quantizes a module's first argument, by position or keyword."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {name: self(value) for name, value in kwargs.items()}


@torch.library.custom_op("mlorq::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """What the pair of operators computes; ``axis`` is -1 for a scale per entry of the last axis."""
    largest = 2**BYTE - 1 if zero.dtype == torch.uint8 else 2 ** (2 * BYTE) - 1
    point = zero.float()
    return (((x / scale).round() + point).clamp(0, largest) - point) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)


def replaced(quantizer: nn.Module) -> nn.Module:
    """A quantizer as a module that exporters write as a pair of operators; itself if its kind has none."""
    if isinstance(quantizer, UniformQuantizer) and quantizer.bits <= 2 * BYTE:
        return QuantizeDequantize(quantizer)
    return quantizer


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The custom operator for the exporter that uses ``torch.export``."""
    from onnxscript import opset21

    def pair(x: Any, scale: Any, zero: Any, axis: int) -> Any:
        codes = opset21.QuantizeLinear(x, scale, zero, axis=axis)
        return opset21.DequantizeLinear(codes, scale, zero, axis=axis)

    return {torch.ops.mlorq.quantize_dequantize.default: pair}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Make the custom operator known to the older exporter for the duration of a ``with`` block."""
    from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

    def pair(graph: Any, x: Any, scale: Any, zero: Any, axis: Any) -> Any:
        at = axis.node()["value"] if hasattr(axis, "node") else axis
        codes = graph.op("QuantizeLinear", x, scale, zero, axis_i=at)
        return graph.op("DequantizeLinear", codes, scale, zero, axis_i=at)

    register_custom_op_symbolic("mlorq::quantize_dequantize", pair, 13)
    try:
        yield
    finally:
        unregister_custom_op_symbolic("mlorq::quantize_dequantize", 13)
