"""Convolutions that compute from packed codes.

Rows of a matrix applied to the input of a convolution are kernels, and the other factors of a product are convolutions
with kernels of one position. In a transposed convolution it is the other way round: rows of the last factor are entries
of its kernels, and the factors before it have kernels of one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.forms.compressed_module import CompressedModule
from mlorq.models.kinds import BY_NAME, Kind


class CompressedConvolution(CompressedModule):
    """A convolution from packed codes. Grouped ones take form ``Q`` only."""

    def _copy_geometry(self, layer: Any) -> None:
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.groups = layer.padding, layer.padding_mode, layer.groups
        self.output_padding = layer.output_padding

    @property
    def _kind(self) -> Kind:
        return BY_NAME[self.kind]

    def _pointwise(self, value: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Product of a matrix ``(rows, columns)`` with every position."""
        result: Tensor = CONVOLUTION[self._kind.axes](value, matrix[(..., *(None,) * self._kind.axes)], bias)
        return result

    def forward(self, input: Tensor) -> Tensor:
        """``(N, in_channels, positions…)``, or without N, to an output of the float layer's shape."""
        first = {term[-1] for term in self.form.terms}  # the factors applied to the input

        def multiply(name: str, value: Tensor, last: bool) -> Tensor:
            bias = self.bias if last else None
            if name in first:
                return self._convolve(value, self.dense(name).unflatten(1, self.weight_shape[1:]), bias)
            return self._pointwise(value, self.dense(name), bias)

        result: Tensor = self.form.apply(multiply, input)
        return result

    def _convolve(self, inputs: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            inputs, padding = F.pad(inputs, self._edges(), mode=self.padding_mode), 0
        # A string is PyTorch's own notation: "same" or "valid".
        return self._kind.function(inputs, kernels, bias, self.stride, padding, self.dilation, self.groups)

    def _edges(self) -> list[int]:
        """Padding in the order of ``F.pad``: of the last axis first, before and behind."""
        edges: list[int] = []
        for axis in reversed(range(self._kind.axes)):
            if isinstance(self.padding, str):
                total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
                edges += [total // 2, total - total // 2]
            else:
                edges += [self.padding[axis]] * 2
        return edges

    def _sizes_repr(self) -> list[str]:
        shown = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        shown += [f"stride={self.stride}", f"padding={self.padding}"]
        return [*shown, f"groups={self.groups}"] if self.groups != 1 else shown


class CompressedTransposed(CompressedConvolution):
    """A transposed convolution from packed codes."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """``(N, in_channels, positions…)``, or without N, to an output of the float layer's shape.

        Args:
            input: the input.
            output_size: sizes of the output, of which the last ones count, in place of the layer's ``output_padding``.
        """
        final = {term[0] for term in self.form.terms}  # the factors whose products are folded into the output
        more = self.output_padding if output_size is None else self._room(input, output_size)

        def multiply(name: str, value: Tensor, last: bool) -> Tensor:
            bias = self.bias if last else None
            if name not in final:
                return self._pointwise(value, self.dense(name), bias)
            kernels = self.dense(name).T.unflatten(1, self.weight_shape[1:])
            kind = self._kind
            return kind.function(value, kernels, bias, self.stride, self.padding, more, self.groups, self.dilation)

        result: Tensor = self.form.apply(multiply, input)
        return result

    def _room(self, inputs: Tensor, output_size: Sequence[int]) -> list[int]:
        """Output padding that gives an output of this size."""
        axes = self._kind.axes
        return [
            wanted - ((given - 1) * step - 2 * edge + width * (size - 1) + 1)
            for wanted, given, step, edge, width, size in zip(
                output_size[-axes:],
                inputs.shape[-axes:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]


class CompressedConv1d(CompressedConvolution):
    """Replaces an ``nn.Conv1d``."""

    kind = "conv1d"
    float_class = nn.Conv1d


class CompressedConv2d(CompressedConvolution):
    """Replaces an ``nn.Conv2d``."""

    kind = "conv2d"
    float_class = nn.Conv2d


class CompressedConv3d(CompressedConvolution):
    """Replaces an ``nn.Conv3d``."""

    kind = "conv3d"
    float_class = nn.Conv3d


class CompressedConvTranspose1d(CompressedTransposed):
    """Replaces an ``nn.ConvTranspose1d``."""

    kind = "conv_transpose1d"
    float_class = nn.ConvTranspose1d


class CompressedConvTranspose2d(CompressedTransposed):
    """Replaces an ``nn.ConvTranspose2d``."""

    kind = "conv_transpose2d"
    float_class = nn.ConvTranspose2d


class CompressedConvTranspose3d(CompressedTransposed):
    """Replaces an ``nn.ConvTranspose3d``."""

    kind = "conv_transpose3d"
    float_class = nn.ConvTranspose3d


CONVOLUTIONS = (
    CompressedConv1d,
    CompressedConv2d,
    CompressedConv3d,
    CompressedConvTranspose1d,
    CompressedConvTranspose2d,
    CompressedConvTranspose3d,
)
CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by number of axes
