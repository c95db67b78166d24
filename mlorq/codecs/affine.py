"""Uniform affine codes with a scale and a zero-point per row (METHOD 1; MLoRQ, arXiv 2507.09616).

``q = clamp(round(w / s) + z, 0, 2^b - 1)``, ``ŵ = (q - z) s``. "Row" is an output row of the matrix in question. Scales
are rounded to float16, or to float32 for weights that
float16 does not reach, before codes are found, so that the searched, measured and stored quantizers are identical
(``mlorq.fitting.scale_search`` searches for them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlorq.codecs.base import (
    FLOAT_BYTES,
    Codec,
    Held,
    Residency,
    StoredMatrix,
    TensorSpec,
    Trainable,
    ZeroPoint,
    held_values,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mlorq.codecs.graph import Graph

ZERO_POINT_DTYPES: dict[ZeroPoint, str] = {
    "codes": "uint8",
    "int16": "int16",
    "codes_float32": "uint8",
    "int16_float32": "int16",
}
# Smallest and largest scales: the smallest positive and largest finite float16; in float32, those whose products with
# codes are normal and finite.
SCALE_LIMITS = {"float16": (2.0**-24, 65504.0), "float32": (2.0**-110, 2.0**110)}
WEIGHTS_IN_FLOAT16 = (2.0**-18, 65504.0)  # largest weights of rows; below, a row would have less than 7 bits


def scale_dtype(stored_as: ZeroPoint) -> str:
    """Name of the dtype of the scales."""
    return "float32" if stored_as.endswith("float32") else "float16"


def stored_scale(scale: Tensor, stored_as: ZeroPoint) -> Tensor:
    """The nearest scales that can be stored, float32, for positive scales of any shape."""
    import torch

    name = scale_dtype(stored_as)
    return scale.clamp(*SCALE_LIMITS[name]).to(getattr(torch, name)).to(torch.float32)


def storage_for(weight: Tensor, chosen: ZeroPoint) -> ZeroPoint:
    """How the rows of a weight ``(rows, columns)`` are stored: as chosen, with float32 scales if it needs them.

    It needs them if a row other than zeros is too small for float16 scales, or if a weight is too large.
    """
    largest = weight.detach().abs().amax(1)
    low, high = WEIGHTS_IN_FLOAT16
    if not bool((((largest > 0) & (largest < low)) | (largest > high)).any()):
        return chosen
    return "int16_float32" if ZERO_POINT_DTYPES[chosen] == "int16" else "codes_float32"


def merged(stored: Iterable[ZeroPoint]) -> ZeroPoint:
    """The storage that holds rows of every given storage."""
    found = list(stored)
    wide = any(ZERO_POINT_DTYPES[one] == "int16" for one in found)
    if any(scale_dtype(one) == "float32" for one in found):
        return "int16_float32" if wide else "codes_float32"
    return "int16" if wide else "codes"


PARTS = ("codes", "scale", "zero_point")


@dataclass(frozen=True)
class RowQuantizer:
    """Scales and zero-points of the rows of a matrix, or of a batch of such matrices.

    Attributes:
        scale: ``(..., rows)`` float32, each positive and exactly a value that can be stored.
        zero_point: ``(..., rows)`` float32 integers.
        bits: bit-width of the codes.
        stored_as: how zero-points and scales are stored.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    stored_as: ZeroPoint = "codes"

    def quantize(self, values: Tensor) -> Tensor:
        """Codes ``(..., rows, columns)``, float32 integers from 0 to ``2^bits - 1``, by nearest rounding."""
        scale, zero_point = self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1)
        return (values / scale).round_().add_(zero_point).clamp_(0, 2**self.bits - 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values ``(q - z) s`` of codes ``(..., rows, columns)``."""
        return (codes - self.zero_point.unsqueeze(-1)) * self.scale.unsqueeze(-1)

    def round_trip(self, values: Tensor) -> Tensor:
        """``dequantize(quantize(values))``: the values after quantization."""
        return self.quantize(values).sub_(self.zero_point.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1))

    def leading(self, rows: int) -> RowQuantizer:
        """The quantizer of the first rows."""
        return replace(self, scale=self.scale[:rows], zero_point=self.zero_point[:rows])

    def store(self, codes: Tensor) -> QuantizedMatrix:
        """The stored form of codes ``(rows, columns)``, on the CPU."""
        import torch

        zero_point = getattr(torch, ZERO_POINT_DTYPES[self.stored_as])
        return QuantizedMatrix(
            codes=codes.to(torch.uint8).cpu(),
            scale=self.scale.to(getattr(torch, scale_dtype(self.stored_as))).cpu(),
            zero_point=self.zero_point.to(zero_point).cpu(),
            bits=self.bits,
        )


class Rounded(NamedTuple):
    """A matrix with its codes and their quantizer.

    Attributes:
        codes: ``(rows, columns)`` float32 integers.
        quantizer: scales and zero-points of its rows.
        values: the matrix before rounding, ``(rows, columns)``.
    """

    codes: Tensor
    quantizer: RowQuantizer
    values: Tensor

    @classmethod
    def nearest(cls, values: Tensor, quantizer: RowQuantizer) -> Rounded:
        """A matrix with every value rounded to its nearest code."""
        return cls(quantizer.quantize(values), quantizer, values)

    def dequantize(self) -> Tensor:
        """The values ``(q - z) s``, ``(rows, columns)`` float32."""
        return self.quantizer.dequantize(self.codes)

    def store(self) -> QuantizedMatrix:
        """The stored form, on the CPU."""
        return self.quantizer.store(self.codes)

    def latent(self, margin: float = 0.05) -> Tensor:
        """``values`` clamped into the cells of the codes, ``margin`` of a cell from its boundary.

        Nearest rounding of the result gives the codes; each value stays on its side of the cell's centre.
        """
        scale = self.quantizer.scale.unsqueeze(-1)
        centre = self.dequantize()
        return centre + (self.values - centre).clamp(-(0.5 - margin) * scale, (0.5 - margin) * scale)


@dataclass(frozen=True)
class QuantizedMatrix(StoredMatrix):
    """A matrix as affine codes.

    Attributes:
        codes: ``(rows, columns)`` uint8.
        scale: ``(rows,)`` float16 or float32.
        zero_point: ``(rows,)`` uint8, or int16 if zero-points may lie outside the codes.
        bits: bit-width of the codes, 1 to 8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def codec(self) -> AffineCodec:
        wide = str(self.zero_point.dtype) == "torch.int16"
        if str(self.scale.dtype) == "torch.float32":
            return AffineCodec(self.bits, "int16_float32" if wide else "codes_float32")
        return AffineCodec(self.bits, "int16" if wide else "codes")

    def tensors(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in PARTS}

    def dequantize(self) -> Tensor:
        """The values ``(q - z) s``, ``(rows, columns)`` float32, bit-identical on every call."""
        centred = self.codes.float() - self.zero_point.float().unsqueeze(1)
        return centred * self.scale.float().unsqueeze(1)

    def to(self, device: torch.device | str) -> QuantizedMatrix:
        return QuantizedMatrix(self.codes.to(device), self.scale.to(device), self.zero_point.to(device), self.bits)

    def trainable(self, device: torch.device | str) -> Trainable:
        from mlorq.codecs.affine_training import TrainableAffine

        return TrainableAffine(self, device)


@dataclass(frozen=True)
class AffineCodec(Codec):
    """Codes packed row by row to whole bytes (``mlorq.codecs.packing``), a scale and a zero-point per row.

    Attributes:
        bits: bit-width of the codes, 1 to 8.
        zero_point: storage of zero-points and scales, see ``Storage``.

    Raises:
        ValueError: ``bits`` is not 1 to 8.
    """

    bits: int
    zero_point: ZeroPoint = "codes"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codes have 1 to 8 bits, not {self.bits}")

    def layout(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec((rows, (columns * self.bits + 7) // 8), "uint8"),
            "scale": TensorSpec((rows,), scale_dtype(self.zero_point)),
            "zero_point": TensorSpec((rows,), ZERO_POINT_DTYPES[self.zero_point]),
        }

    def size(self, rows: int, columns: int) -> int:
        """``rows (ceil(columns bits / 8) + s + z)`` bytes, s = 2 or 4 of the scale, z = 1 (codes) or 2 (int16)."""
        z = np.dtype(ZERO_POINT_DTYPES[self.zero_point]).itemsize
        s = np.dtype(scale_dtype(self.zero_point)).itemsize
        return rows * ((columns * self.bits + 7) // 8 + s + z)

    def held(self, rows: int, columns: int, residency: Residency) -> Held:
        """Codes in the next bit-width of the runtime, a float32 scale and a zero-point per row."""
        wide = next((bits for bits in residency.code_bits if bits >= self.bits), None)
        if wide is None:
            return held_values(rows, columns, residency)
        return Held(rows * columns * wide // 8 + (FLOAT_BYTES + 1) * rows, True)

    def unpaid(self, rows: int, columns: int) -> int:
        # Per row: a byte of padding, the scale, and a zero-point of either kind.
        return (3 + np.dtype(scale_dtype(self.zero_point)).itemsize) * rows

    def pack(self, matrix: StoredMatrix) -> dict[str, Tensor]:
        from mlorq.codecs.packing import pack_rows

        assert isinstance(matrix, QuantizedMatrix)
        return matrix.tensors() | {"codes": pack_rows(matrix.codes, self.bits)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> QuantizedMatrix:
        from mlorq.codecs.packing import unpack_rows

        codes = unpack_rows(tensors["codes"], columns, self.bits)
        return QuantizedMatrix(codes, tensors["scale"], tensors["zero_point"], self.bits)

    def dequantize_rows(self, tensors: Mapping[str, Tensor], rows: Tensor, columns: int) -> Tensor:
        return self.unpack({part: tensor[rows] for part, tensor in tensors.items()}, columns).dequantize()

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        codes = tensors["codes"]
        return QuantizedMatrix(codes.byte(), tensors["scale"], tensors["zero_point"], self.bits)

    def graph_values(self, graph: Graph, tensors: Mapping[str, Tensor], columns: int) -> str:
        from mlorq.codecs.affine_graph import values

        return values(graph, tensors, columns, self.bits)

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
        from mlorq.codecs.affine_graph import product

        if fast and not integers and self.bits > graph.kernel_bits:
            return super().graph_product(graph, inputs, tensors, columns, fast=True)
        return product(graph, inputs, tensors, columns, self.bits, integers=integers)

    def graph_rows(self, graph: Graph, indices: str, tensors: Mapping[str, Tensor], columns: int) -> str:
        from mlorq.codecs.affine_graph import rows

        return rows(graph, indices, tensors, columns, self.bits)
