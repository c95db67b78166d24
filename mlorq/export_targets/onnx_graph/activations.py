"""Quantizers of activations as QuantizeLinear and DequantizeLinear.

A uniform quantizer with one range becomes this pair. Values are clamped before if the codes are fewer than the
integers, and a zero-point that is not one of the codes becomes a shift of the values: ``x̄ = D(Q(x + h)) - h``. A linear
layer takes the last shift into its bias, ``x̄ Wᵀ + b = D(Q(x + h)) Wᵀ + (b - W h)``, so that its product is one of
integers. A quantizer with ranges by channel is ``x̄ = (D(Q(x / s + z)) - z) s`` with a pair of scale 1: onnxruntime
takes thirty times as long for a pair with a scale per entry of the last axis. Other kinds stay the operators of their
arithmetic.
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
    channel_scale: Tensor
    channel_zero: Tensor

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        scale, zero, levels = quantizer.scale, quantizer.zero, quantizer.levels
        self.by_channel = scale.numel() > 1
        if self.by_channel:
            self.register_buffer("channel_scale", scale.clone())
            self.register_buffer("channel_zero", zero.clone())
            scale, zero = torch.ones(()), torch.zeros(())
        scale, zero = scale.reshape(()), zero.reshape(())
        integers = torch.uint8 if quantizer.bits <= BYTE else torch.uint16
        fits = bool(zero == zero.round()) and 0 <= float(zero) <= levels
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
        if self.by_channel:
            return (self._pair(x / self.channel_scale + self.channel_zero) - self.channel_zero) * self.channel_scale
        return self._pair(x)

    def _pair(self, x: Tensor) -> Tensor:
        if self.shifts:
            x = x + self.shift
        if self.clamps:
            x = torch.minimum(torch.maximum(x, self.low), self.high)
        found: Tensor = torch.ops.mlorq.quantize_dequantize(x, self.scale, self.zero)
        return found - self.shift if self.shifts_back else found

    def move_shift(self, layer: nn.Linear) -> None:
        """Move the last shift of a linear layer's input into its bias, which becomes ``b - W h``."""
        if self.shifts_back:
            moved = layer.weight.double().sum(1) * self.shift.double()
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
def quantize_dequantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What the pair of operators computes."""
    largest = 2**BYTE - 1 if zero.dtype == torch.uint8 else 2 ** (2 * BYTE) - 1
    point = zero.float()
    return (((x / scale).round() + point).clamp(0, largest) - point) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x)


def replaced(quantizer: nn.Module) -> nn.Module:
    """A quantizer as a module that exporters write as a pair of operators; itself if its kind has none."""
    if isinstance(quantizer, UniformQuantizer) and quantizer.bits <= 2 * BYTE:
        return QuantizeDequantize(quantizer)
    return quantizer


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The custom operator for the exporter that uses ``torch.export``."""
    from onnxscript import opset21

    def pair(x: Any, scale: Any, zero: Any) -> Any:
        return opset21.DequantizeLinear(opset21.QuantizeLinear(x, scale, zero), scale, zero)

    return {torch.ops.mlorq.quantize_dequantize.default: pair}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Make the custom operator known to the older exporter for the duration of a ``with`` block."""
    from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

    def pair(graph: Any, x: Any, scale: Any, zero: Any) -> Any:
        return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, scale, zero), scale, zero)

    register_custom_op_symbolic("mlorq::quantize_dequantize", pair, 13)
    try:
        yield
    finally:
        unregister_custom_op_symbolic("mlorq::quantize_dequantize", 13)
