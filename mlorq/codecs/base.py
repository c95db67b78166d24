"""Storage of one matrix: a codec defines the stored tensors and their size; a stored matrix holds their values.

A form stores matrices by name, each with its own codec, so only a codec's file interprets its tensors. ``AffineCodec``
has codes, a scale and a zero-point per row; another codec may store codes column by column, or have no zero-points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mlorq.codecs.graph import Graph

ZeroPoint = Literal["codes", "int16", "codes_float32", "int16_float32"]
Accounting = Literal["exact", "paper"]

FLOAT_BYTES = 4  # sizes are compared with the float32 size, whatever the model's dtype


@dataclass(frozen=True)
class Residency:
    """How a runtime holds the matrices of linear layers in memory while it computes.

    Attributes:
        code_bits: bit-widths in which its products read affine codes, ascending; codes are held in the next one. Empty:
            it decodes all codes.
        value_bits: bits of the values of all other matrices: 32, or 8 if products are rounded.
        packed: whether all packed tensors stay as they are stored, and are decoded in every call.
    """

    code_bits: tuple[int, ...] = ()
    value_bits: int = 8 * FLOAT_BYTES
    packed: bool = False


@dataclass(frozen=True)
class Storage:
    """How matrices are stored, and how their bytes are counted (METHOD 2).

    Attributes:
        accounting: ``exact``, what the checkpoint holds; ``paper``, the bits of the codes alone (arXiv 2507.09616).
        zero_point: range of zero-points: ``codes``, those of the codes (uint8); ``int16``, any int16 value. With
            ``_float32`` scales are float32 instead of float16, for rows that float16 does not reach.
        residency: how the runtime that the model is meant for holds matrices; None: none is chosen.
    """

    accounting: Accounting = "exact"
    zero_point: ZeroPoint = "codes"
    residency: Residency | None = None


class Held(NamedTuple):
    """What a runtime holds of a weight or a matrix.

    Attributes:
        bytes: its size in memory.
        native: whether the runtime computes with it as it is meant to: with integers, or with floats if it decodes all
            codes.
    """

    bytes: int
    native: bool


def held_values(rows: int, columns: int, residency: Residency) -> Held:
    """What a runtime holds of a matrix of which it does not read the codes."""
    if residency.value_bits < 8 * FLOAT_BYTES:  # a scale per row
        return Held(rows * columns * residency.value_bits // 8 + FLOAT_BYTES * rows, True)
    return Held(FLOAT_BYTES * rows * columns, not residency.code_bits)


class TensorSpec(NamedTuple):
    """One stored tensor.

    Attributes:
        shape: shape of the tensor.
        dtype: name of its torch dtype, such as ``uint8``.
    """

    shape: tuple[int, ...]
    dtype: str


class FittedMatrix(Protocol):
    """A matrix with its codes, as a fit returns it."""

    def dequantize(self) -> Tensor:
        """The values, ``(rows, columns)`` float32."""

    def store(self) -> StoredMatrix:
        """The stored form, on the CPU."""


class Trainable(Protocol):
    """The trainable parameters of a stored matrix (METHOD 7)."""

    @property
    def latent(self) -> nn.Parameter | None:
        """Parameter from which the codes are computed, in units of codes; None if codes are fixed."""

    @property
    def growth(self) -> nn.Parameter | None:
        """Logarithm of the growth of the scales; None if scales are fixed."""

    def values(self) -> Tensor:
        """Dequantized values, ``(rows, columns)`` float32, differentiable."""

    def result(self) -> StoredMatrix:
        """The matrix with its current codes and scales, on the CPU."""


class StoredMatrix(ABC):
    """A matrix as it is stored, with its codes unpacked."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """The codec that stores it."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Unpacked tensors by part, as the artifact of a rounded layer holds them."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The values, ``(rows, columns)`` float32, bit-identical on every call."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same matrix on another device."""

    def trainable(self, device: torch.device | str) -> Trainable | None:
        """Trainable parameters on ``device``, initialised from this matrix; None: the matrix stays fixed."""
        return None


class Codec(ABC):
    """A way to store a matrix.

    Attributes:
        bits: bit-width of the codes.
        zero_point: range of the zero-points, for codecs that have them (see ``Storage``).
    """

    bits: int
    zero_point: ZeroPoint = "codes"

    @abstractmethod
    def layout(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The packed tensors of a ``(rows, columns)`` matrix, by part."""

    @abstractmethod
    def size(self, rows: int, columns: int) -> int:
        """Bytes of these tensors."""

    def unpaid(self, rows: int, columns: int) -> int:
        """Upper bound on ``size - rows · columns · bits / 8``, the bytes that ``paper`` accounting does not count."""
        return self.size(rows, columns) - rows * columns * self.bits // 8

    def in_blocks(self, columns: int) -> bool:
        """Whether a matrix of so many columns is stored in blocks of them, which earlier versions would misread."""
        return False

    def held(self, rows: int, columns: int, residency: Residency) -> Held:
        """What a runtime that does not keep packed tensors holds of a matrix; by default its decoded values."""
        return held_values(rows, columns, residency)

    @abstractmethod
    def pack(self, matrix: StoredMatrix) -> dict[str, Tensor]:
        """The packed tensors of a matrix, by part.

        Raises:
            ValueError: a code does not fit ``bits`` bits.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> StoredMatrix:
        """The inverse of ``pack``."""

    def dequantize_rows(self, tensors: Mapping[str, Tensor], rows: Tensor, columns: int) -> Tensor:
        """The values of some rows of a packed matrix, ``(len(rows), columns)`` float32."""
        return self.unpack(tensors, columns).dequantize()[rows]

    @abstractmethod
    def from_tensors(self, tensors: Mapping[str, Tensor]) -> StoredMatrix:
        """The inverse of ``StoredMatrix.tensors``."""

    # -- operators of exported graphs (mlorq.codecs.graph) ----------------------------------------------------

    def graph_values(self, graph: Graph, tensors: Mapping[str, Tensor], columns: int) -> str:
        """Write operators that decode a packed matrix: the transposed values, ``(columns, rows)`` float32.

        By default the values are a constant, as large as the float matrix.
        """
        return graph.constant(self.unpack(tensors, columns).dequantize().T.contiguous().numpy())

    def graph_product(
        self,
        graph: Graph,
        inputs: str,
        tensors: Mapping[str, Tensor],
        columns: int,
        *,
        fast: bool = False,
        integers: bool = False,
    ) -> str:
        """Write ``x Ŵᵀ`` for x ``(…, columns)``; by default a product with the decoded values.

        Args:
            graph: the graph.
            inputs: name of x.
            tensors: the packed tensors of the matrix.
            columns: its columns.
            fast: whether x and Ŵ may be rounded to 8 bits.
            integers: whether x is dequantized 8-bit integers with one scale: the output of a DequantizeLinear.
        """
        from mlorq.codecs.graph import product

        return product(graph, inputs, self.graph_values(graph, tensors, columns), fast=fast, integers=integers)

    def graph_rows(self, graph: Graph, indices: str, tensors: Mapping[str, Tensor], columns: int) -> str:
        """Write a look-up of rows: ``(…, columns)`` float32 for int64 indices ``(…)``."""
        values = graph.node("Transpose", self.graph_values(graph, tensors, columns), perm=[1, 0])
        return graph.node("Gather", values, indices, axis=0)
