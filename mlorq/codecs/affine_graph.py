"""Affine codes as operators: the values of a matrix, its product by 4-bit kernels, and single rows.

onnxruntime fuses ``DequantizeLinear`` of 4-bit codes ``(K, N)`` with one scale per column and the ``MatMul`` that
follows; the codes stay packed in memory. Codes with more bits than the kernels are two such products: ``q - z`` is
``(q_low - z_low) + 16 (q_high - z_high)``. Where x is made of integers, too, the codes are the int8 operand of one
integer product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mlorq.codecs.graph import LARGEST, Graph, integers, packed_codes, sizes
from mlorq.codecs.packing import packed_columns, unpack_rows

if TYPE_CHECKING:
    from torch import Tensor

BYTE = 8  # bits
HALF_BYTE = 4  # bits of the smaller of the two integers


def values(graph: Graph, tensors: Mapping[str, Tensor], columns: int, bits: int) -> str:
    """The transposed values ``(q - z) s``, ``(columns, rows)`` float32."""
    codes = graph.node("Cast", packed_codes(graph, _codes(tensors, columns, bits), bits), to="float32")
    return graph.node("Mul", graph.node("Sub", codes, _zero_points(graph, tensors)), _scales(graph, tensors))


def product(
    graph: Graph, inputs: str, tensors: Mapping[str, Tensor], columns: int, bits: int, *, integers: bool = False
) -> str:
    """``x Ŵᵀ`` of ``x`` ``(…, columns)``: an integer product, one of 4-bit or 8-bit codes, or two of 4-bit codes.

    Args:
        graph: the graph.
        inputs: name of x.
        tensors: the packed tensors of W.
        columns: its columns.
        bits: bit-width of the codes.
        integers: whether x is dequantized 8-bit integers, so that runtimes multiply integers.
    """
    codes, zero = _codes(tensors, columns, bits), tensors["zero_point"].numpy().astype(np.int64)
    if integers and (weight := _signed(graph, tensors, codes, zero, bits)):
        return graph.node("MatMul", inputs, weight)
    # Zero-points outside the codes do not fit the kernels: x (q - z) s = x q s - sum(x) z s.
    outside = bool((zero < 0).any() or (zero >= 2**bits).any())
    inside = np.zeros_like(zero) if outside else zero
    scale, total = _scales(graph, tensors), ""
    for low in range(0, bits, graph.kernel_bits):
        width = min(graph.kernel_bits, bits - low)
        mask = 2**width - 1
        part = packed_codes(graph, (codes >> low) & mask, width)
        point = graph.constant(((inside >> low) & mask).astype(np.uint8))
        if width <= HALF_BYTE:
            part, point = (graph.node("Cast", one, to="uint4") for one in (part, point))
        own = graph.node("Mul", scale, graph.constant(np.array(2.0**low, np.float32))) if low else scale
        weight = graph.node("DequantizeLinear", part, own, point, axis=1)
        found = graph.node("MatMul", inputs, weight)
        total = graph.node("Add", total, found) if total else found
    if outside:
        sums = graph.node("ReduceSum", inputs, sizes(graph, -1), keepdims=1)
        shift = graph.node("Mul", _zero_points(graph, tensors), scale)
        total = graph.node("Sub", total, graph.node("Mul", sums, shift))
    return total


def rows(graph: Graph, indices: str, tensors: Mapping[str, Tensor], columns: int, bits: int) -> str:
    """The values of some rows, ``(…, columns)`` float32 for indices ``(…)``; only these rows are unpacked."""
    first = np.arange(columns) * bits
    last = packed_columns(columns, bits) - 1
    found = graph.node("Gather", graph.constant(tensors["codes"].numpy()), indices, axis=0)
    if bits < BYTE:
        found = graph.node("Cast", found, to="int32")
        low = graph.node("Gather", found, integers(graph, first // BYTE), axis=-1)
        if BYTE % bits == 0:
            # A code is a part of one byte: a table has the code of every place and byte.
            shifts, every = np.arange(0, BYTE, bits)[:, None], np.arange(2**BYTE)
            table = ((every >> shifts) & (2**bits - 1)).astype(np.uint8).reshape(-1)
            place = graph.node("Add", low, integers(graph, 2**BYTE * (np.arange(columns) % (BYTE // bits))))
            found = graph.node("Gather", integers(graph, table, "float32"), place)
        else:
            # The code starts in one byte and may end in the next one.
            high = graph.node("Gather", found, integers(graph, np.minimum(first // BYTE + 1, last)), axis=-1)
            both = graph.node("Add", low, graph.node("Mul", high, graph.constant(np.array(2**BYTE, np.int32))))
            found = graph.node("Div", both, integers(graph, 2 ** (first % BYTE)))
            found = graph.node("BitwiseAnd", found, graph.constant(np.array(2**bits - 1, np.int32)))
            found = graph.node("Cast", found, to="float32")
    else:
        found = graph.node("Cast", found, to="float32")
    axis = sizes(graph, -1)
    zero, scale = (
        graph.node("Unsqueeze", graph.node("Gather", graph.constant(tensors[part].numpy()), indices, axis=0), axis)
        for part in ("zero_point", "scale")
    )
    centred = graph.node("Sub", found, graph.node("Cast", zero, to="float32"))
    return graph.node("Mul", centred, graph.node("Cast", scale, to="float32"))


def _codes(tensors: Mapping[str, Tensor], columns: int, bits: int) -> np.ndarray:
    """Unpacked codes, transposed: ``(columns, rows)`` uint8."""
    return np.ascontiguousarray(unpack_rows(tensors["codes"], columns, bits).numpy().T)


def _signed(graph: Graph, tensors: Mapping[str, Tensor], codes: np.ndarray, zero: np.ndarray, bits: int) -> str:
    """The transposed values, dequantized from int8, which kernels take faster than uint8; "" if a zero-point is wider.

    Codes of 8 bits and their zero-points are 128 less.
    """
    offset = 2 ** (BYTE - 1) if bits == BYTE else 0
    limits, point = np.iinfo(np.int8), zero - offset
    if (point < limits.min).any() or (point > limits.max).any():
        return ""
    signed = (codes.astype(np.int16) - offset).astype(np.int8)
    graph.overflows |= bool((np.abs(signed.astype(np.int16)) > LARGEST).any())
    part = graph.node("Cast", packed_codes(graph, codes, bits), to="int8") if not offset else graph.constant(signed)
    return graph.node("DequantizeLinear", part, _scales(graph, tensors), graph.constant(point.astype(np.int8)), axis=1)


def _scales(graph: Graph, tensors: Mapping[str, Tensor]) -> str:
    return graph.node("Cast", graph.constant(tensors["scale"].numpy()), to="float32")


def _zero_points(graph: Graph, tensors: Mapping[str, Tensor]) -> str:
    return graph.node("Cast", graph.constant(tensors["zero_point"].numpy()), to="float32")
