"""What a layer's weight matrix multiplies, and where the products go: tokens of inputs and outputs.

Unfolding the input of a convolution gives the columns of its matrix product. The output of a transposed convolution is
folded from products; the adjoint of folding is unfolding, so that the gradient of its products is the unfolded gradient
of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.kinds import GEOMETRY, Kind, known_kind


def input_tokens(module: nn.Module, inputs: Tensor, samples: int) -> Tensor:
    """Inputs of a layer's matrix product, grouped by sample: ``(samples, tokens, in_features)``.

    The input of a convolution is unfolded (if it is grouped, to ``groups · in_features``); that of a transposed one has
    its positions as tokens. If the leading axis has several rows per sample (windows, regions), these become tokens of
    the sample.

    Args:
        module: the layer; with ``samples_axis = 1`` samples are on the second axis (``mlorq.models.samples_axis``).
        inputs: the tensor that the layer is called with.
        samples: number of samples in it.

    Raises:
        ModelError: the leading size is not a multiple of the number of samples.
    """
    kind = known_kind(module)
    if kind.axes:
        inputs = _batched(kind, inputs)
        inputs = (inputs.flatten(2) if kind.is_transposed else _windows(module, inputs)).transpose(1, 2)
    return _by_sample(inputs, samples, getattr(module, "samples_axis", 0))


def output_tokens(module: nn.Module, outputs: Tensor, samples: int) -> Tensor:
    """Gradient of a layer's products from that of its output: ``(samples, tokens, out_features)``, as ``input_tokens``.

    Where products are not folded, this is also the layer's output.
    """
    kind = known_kind(module)
    if kind.axes:
        outputs = _batched(kind, outputs)
        outputs = (_windows(module, outputs) if kind.is_transposed else outputs.flatten(2)).transpose(1, 2)
    return _by_sample(outputs, samples, getattr(module, "samples_axis", 0))


def positions(module: nn.Module, inputs: Tensor, outputs: Any) -> int:
    """Number of vectors that a layer's matrix multiplies in one call.

    Args:
        module: the layer.
        inputs: the tensor that it is called with.
        outputs: what it returns; a linear layer of a library may return several tensors.
    """
    kind = known_kind(module)
    values = outputs if kind.axes and not kind.is_transposed else inputs
    return int(values.numel() // values.shape[-kind.axes - 1])


def leading_size(module: nn.Module, inputs: Tensor) -> int:
    """Leading size of a layer's input: 1 for an input without an axis of samples."""
    axis = getattr(module, "samples_axis", 0)
    return int(inputs.shape[axis]) if inputs.dim() > known_kind(module).axes + 1 else 1


def reading(module: nn.Module) -> tuple[Any, ...]:
    """Equal for layers whose matrices multiply the same vectors if they read the same tensor."""
    kind = known_kind(module)
    if not kind.axes:
        return ()
    if kind.is_transposed:
        return ("positions",)
    return ("windows", *(str(getattr(module, name, None)) for name in GEOMETRY))


def unfold(
    inputs: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Windows of a tensor with one to three axes of positions, zero-padded: ``F.unfold`` for all of these.

    Args:
        inputs: ``(N, channels, positions…)``.
        kernel, dilation, padding, stride: one number per axis of positions.

    Returns:
        ``(N, channels · k, windows)``, the last axis of positions fastest.
    """
    axes = len(kernel)
    if axes == 1:
        inputs = inputs.unsqueeze(2)
        return _unfold(inputs, (1, *kernel), (1, *dilation), (0, *padding), (1, *stride))
    if axes == 2:
        return _unfold(inputs, kernel, dilation, padding, stride)
    # Slices of the first axis become channels of images, which are unfolded.
    inputs = F.pad(inputs, (0, 0, 0, 0, padding[0], padding[0]))
    slices = inputs.unfold(2, dilation[0] * (kernel[0] - 1) + 1, stride[0])[..., :: dilation[0]]
    slices = slices.permute(0, 2, 1, 5, 3, 4)  # (N, depth, channels, k, height, width)
    images = slices.flatten(0, 1).flatten(1, 2)
    windows = _unfold(images, kernel[1:], dilation[1:], padding[1:], stride[1:])
    return windows.reshape(*slices.shape[:2], *windows.shape[1:]).transpose(1, 2).flatten(2)


def _unfold(images: Tensor, *geometry: Sequence[int]) -> Tensor:
    kernel, dilation, padding, stride = (tuple(numbers) for numbers in geometry)
    return F.unfold(images, kernel, dilation, padding, stride)


def _windows(module: Any, values: Tensor) -> Tensor:
    """Unfolded input of a convolution, or output of a transposed one, ``(N, channels · k, windows)``."""
    padding: Sequence[int] = (0,) * len(module.kernel_size)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        values = F.pad(values, module._reversed_padding_repeated_twice, mode=mode)
    else:
        padding = module.padding
    return unfold(values, module.kernel_size, module.dilation, padding, module.stride)


def _batched(kind: Kind, values: Tensor) -> Tensor:
    return values[None] if values.dim() == kind.axes + 1 else values


def _by_sample(values: Tensor, samples: int, axis: int = 0) -> Tensor:
    if axis:
        values = values.transpose(0, axis)
    if values.shape[0] % samples:
        raise ModelError(
            f"its inputs have {values.shape[0]} rows, not a multiple of {samples} samples: put samples on the first "
            "axis, or pass batches of one sample each"
        )
    return values.reshape(samples, -1 if values.numel() else 0, values.shape[-1])
