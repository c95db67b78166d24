"""How one matrix is stored: a codec says which tensors hold it and what they weigh; a stored matrix is their values.

A form stores matrices by name, each with a codec of its own, so nothing outside a codec's file knows what its tensors
mean. ``AffineCodec`` has codes, a scale and a zero-point per row; another one may have codes that run down columns, or
no zero-points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ZeroPoint = Literal["codes", "int16"]
Accounting = Literal["exact", "paper"]

FLOAT_BYTES = 4  # sizes are compared with the float32 size, whatever dtype the model runs in


@dataclass(frozen=True)
class Storage:
    """How matrices are stored, and how their bytes are counted (METHOD 2).

    Attributes:
        accounting: ``exact``, what the checkpoint holds; ``paper``, the bits of the codes alone (arXiv 2507.09616).
        zero_point: where zero-points lie: among the codes (uint8), or anywhere (int16).
    """

    accounting: Accounting = "exact"
    zero_point: ZeroPoint = "codes"


class TensorSpec(NamedTuple):
    """One stored tensor.

    Attributes:
        shape: of the tensor.
        dtype: torch's name of its dtype, ``uint8``.
    """

    shape: tuple[int, ...]
    dtype: str


class StoredMatrix(ABC):
    """A matrix as it is stored, with its codes unpacked."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """What it is stored by."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Unpacked tensors by part: what an artifact of a rounded layer holds."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The values, ``(rows, columns)`` float32, the same bits on every call."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same matrix on another device."""


class Codec(ABC):
    """A way to store a matrix.

    Attributes:
        bits: of a code.
        zero_point: where zero-points lie, of codecs that have any.
    """

    bits: int
    zero_point: ZeroPoint = "codes"

    @abstractmethod
    def layout(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The stored tensors of a matrix ``(rows, columns)``, packed, by part."""

    @abstractmethod
    def size(self, rows: int, columns: int) -> int:
        """Bytes of these tensors."""

    def unpaid(self, rows: int, columns: int) -> int:
        """Most bytes by which ``size`` exceeds ``rows · columns · bits / 8``, which is all that ``paper`` counts."""
        return self.size(rows, columns) - rows * columns * self.bits // 8

    @abstractmethod
    def pack(self, matrix: StoredMatrix) -> dict[str, Tensor]:
        """The stored tensors by part.

        Raises:
            ValueError: a code does not fit.
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
