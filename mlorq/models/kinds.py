"""The kinds of compressible layers: the module, its function, and its weight as a matrix.

The matrix of a weight is ``(out_features, in_features)``.
A convolution multiplies unfolded windows of its input, so that a row of its matrix is a kernel, ``in_channels / groups
· k``. A transposed convolution multiplies each position of its input and folds the results, overlapping, into its
output; its weight is stored ``(in_channels, out_channels, k…)``, and its matrix is ``(out_channels · k, in_channels)``.
What a layer multiplies, and what it makes of the products, is in ``unfolding``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.models.layer_list import LINEAR

PRODUCT = ("input", "weight", "bias")
CONVOLUTION = (*PRODUCT, "stride", "padding", "dilation", "groups")
TRANSPOSED = (*PRODUCT, "stride", "padding", "output_padding", "groups", "dilation")
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding")


@dataclass(frozen=True)
class Kind:
    """One kind of layer with a weight that can be compressed.

    Attributes:
        name: its name in tables and checkpoints.
        layer: class of the float layer.
        function: the function that computes it.
        arguments: names of the function's arguments, in order.
        axes: number of axes of the kernels; 0: not a convolution.
    """

    name: str
    layer: type[nn.Module]
    function: Callable[..., Tensor]
    arguments: tuple[str, ...] = PRODUCT
    axes: int = 0

    @property
    def is_transposed(self) -> bool:
        """Whether products are folded into the output."""
        return self.arguments is TRANSPOSED

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(out_features, in_features)`` of a weight of this shape."""
        first, others = shape[0], math.prod(shape[1:])  # of integers of any size: no product overflows
        return (others, first) if self.is_transposed else (first, others)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """A weight as the matrix of its products, ``(out_features, in_features)``; a view where possible."""
        matrix = weight.reshape(weight.shape[0], -1)
        return matrix.T if self.is_transposed else matrix

    def to_weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``to_matrix``, contiguous.

        Args:
            matrix: ``(out_features, in_features)``.
            shape: of the weight.
        """
        return (matrix.T if self.is_transposed else matrix).contiguous().view(*shape)


KINDS = (
    Kind(LINEAR, nn.Linear, F.linear),
    Kind("conv1d", nn.Conv1d, F.conv1d, CONVOLUTION, 1),
    Kind("conv2d", nn.Conv2d, F.conv2d, CONVOLUTION, 2),
    Kind("conv3d", nn.Conv3d, F.conv3d, CONVOLUTION, 3),
    Kind("conv_transpose1d", nn.ConvTranspose1d, F.conv_transpose1d, TRANSPOSED, 1),
    Kind("conv_transpose2d", nn.ConvTranspose2d, F.conv_transpose2d, TRANSPOSED, 2),
    Kind("conv_transpose3d", nn.ConvTranspose3d, F.conv_transpose3d, TRANSPOSED, 3),
)
TABLE = Kind("embedding", nn.Embedding, F.embedding)  # not a layer of the search

CLASSES = tuple(kind.layer for kind in KINDS)
BY_NAME = {kind.name: kind for kind in (*KINDS, TABLE)}


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a float layer; None if it is not compressible."""
    return next((kind for kind in KINDS if isinstance(layer, kind.layer)), None)


def known_kind(layer: nn.Module) -> Kind:
    """The kind of a float layer.

    Raises:
        TypeError: it is not compressible.
    """
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"{type(layer).__name__} is not a compressible layer")
    return kind


def why_not_a_product(layer: nn.Module) -> str | None:
    """Reason why a layer of a known kind is not one product with one matrix; or None."""
    kind = known_kind(layer)
    if not kind.is_transposed:
        return None
    name = type(layer).__name__
    if layer.groups != 1:
        return f"a parameter of {name} with {layer.groups} groups"
    assert isinstance(layer.output_padding, tuple)
    assert isinstance(layer.stride, tuple)
    if any(more >= step for more, step in zip(layer.output_padding, layer.stride, strict=True)):
        # Its output would have room for more windows than the input has positions.
        return f"a parameter of {name} with an output padding that is not smaller than its stride"
    return None
