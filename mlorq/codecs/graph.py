"""The interface by which codecs and forms write themselves as operators of a graph (ONNX), and operators they share.

A codec writes operators that decode its packed tensors from constants. A runtime that folds constants runs them once,
at load. Weights are written transposed, ``(columns, rows)`` = ``(in_features, out_features)``: as the right operand of
``x Wᵀ``.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

PLANES = (4, 2, 1)  # bits of the planes into which codes are split: each divides a byte
PLANE_TENSORS = 3  # bytes per code of the tensors between a plane and the codes
SMALLEST = 1e-30  # divisor, in place of zero
LARGEST = 63  # of 8-bit weights: 2 · 255 · 63 < 2¹⁵, so that no kernel with 16-bit sums of two products saturates


class Graph(Protocol):
    """A graph under construction; values are named by strings.

    Attributes:
        kernel_bits: most bits of a weight in one product whose codes stay packed in memory.
        overflows: whether a weight of an integer product is above ``LARGEST``; set by codecs.
    """

    kernel_bits: int
    overflows: bool

    def constant(self, values: np.ndarray) -> str:
        """A constant; equal constants are stored once."""

    def codes(self, values: np.ndarray, decoding_bytes: int) -> str:
        """A constant of packed codes, which operators decode at load.

        Args:
            values: uint8 or uint16.
            decoding_bytes: of the tensors between the codes and the weights; graphs may decode codes in turn, so that
                not all these tensors are in memory at once.
        """

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """The output of an operator; equal operators on equal inputs are written once.

        Args:
            operator: name in the default domain, opset 21.
            inputs: names of its inputs.
            attributes: its attributes; dtypes are names, as in ``to="float32"``. ``outputs`` is the number of outputs;
                the names of the second and further outputs are that of the first with ``.1``, ``.2`` …
        """


def integers(graph: Graph, values: np.ndarray, dtype: str = "int32") -> str:
    """Non-negative integers as a constant of the smallest dtype, cast to ``dtype``."""
    small = graph.constant(values.astype(np.min_scalar_type(int(values.max(initial=0)))))
    return graph.node("Cast", small, to=dtype)


def sizes(graph: Graph, *values: int) -> str:
    """A constant int64 vector, for shapes, axes and bounds."""
    return graph.constant(np.array(values, np.int64))


def packed_codes(graph: Graph, codes: np.ndarray, bits: int) -> str:
    """Codes of any shape as bit planes, packed to whole bytes, and the operators that unpack them to uint8.

    Args:
        graph: the graph.
        codes: uint8, below ``2^bits``.
        bits: bit-width, 1 to 8.
    """
    if bits == 8:
        return graph.constant(codes)
    found, low = "", 0
    for width in PLANES:
        while bits - low >= width:
            plane = _plane((codes >> low) & (2**width - 1), width)
            shifts = np.arange(0, 8, width, dtype=np.uint8)[None]
            packed = graph.codes(plane[:, None], PLANE_TENSORS * codes.size)
            part = graph.node("BitShift", packed, graph.constant(shifts), direction="RIGHT")
            part = graph.node("BitwiseAnd", part, graph.constant(np.array(2**width - 1, np.uint8)))
            if codes.size * width % 8:  # the last byte is not full
                part = graph.node("Reshape", part, sizes(graph, -1))
                part = graph.node("Slice", part, sizes(graph, 0), sizes(graph, codes.size))
            part = graph.node("Reshape", part, sizes(graph, *codes.shape))
            if low:
                part = graph.node("BitShift", part, graph.constant(np.array(low, np.uint8)), direction="LEFT")
            found = graph.node("BitwiseOr", found, part) if found else part
            low += width
    return found


def _plane(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes of 1, 2 or 4 bits, packed least significant first."""
    bits = (codes.reshape(-1, 1) >> np.arange(width, dtype=np.uint8)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def product(graph: Graph, inputs: str, weight: str, *, fast: bool = False, integers: bool = False) -> str:
    """``x W`` in float32, or by 8-bit integers with a scale per column of W, found at load, and per row of x.

    Args:
        graph: the graph.
        inputs: x, ``(…, K)`` float32.
        weight: W, ``(K, N)`` float32.
        fast: whether to round to 8 bits.
        integers: whether x is dequantized 8-bit integers, which runtimes then multiply as they are.
    """
    if not fast:
        return graph.node("MatMul", inputs, weight)
    scale = graph.node("Mul", _largest(graph, weight, axis=0), graph.constant(np.array(1 / LARGEST, np.float32)))
    codes = graph.node("QuantizeLinear", weight, scale, axis=1, output_dtype="int8")
    if integers:
        return graph.node("MatMul", inputs, graph.node("DequantizeLinear", codes, scale, axis=1))
    # The operator has one range for all of x; rows divided by their largest entries share it.
    largest = _largest(graph, inputs, axis=-1)
    quantized = graph.node("DynamicQuantizeLinear", graph.node("Div", inputs, largest), outputs=3)
    found = graph.node("MatMulInteger", quantized, codes, f"{quantized}.2")
    found = graph.node("Mul", graph.node("Cast", found, to="float32"), graph.node("Mul", f"{quantized}.1", scale))
    return graph.node("Mul", found, largest)


def _largest(graph: Graph, values: str, axis: int) -> str:
    """The largest absolute value along an axis, which is kept along the last axis; not below ``SMALLEST``."""
    found = graph.node("ReduceMax", graph.node("Abs", values), sizes(graph, axis), keepdims=int(axis == -1))
    return graph.node("Max", found, graph.constant(np.array(SMALLEST, np.float32)))


def hadamard(size: int) -> np.ndarray:
    """The Hadamard matrix in Sylvester's order, ``(size, size)`` int8; ``size`` is a power of two."""
    found = np.ones((1, 1), np.int8)
    for _ in range(int(math.log2(size))):
        found = np.block([[found, found], [found, -found]])
    return found
