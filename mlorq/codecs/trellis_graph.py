"""Trellis codes as operators that decode them at load (docs/TRELLIS.md).

The stream of a column is stored with its first symbol in the highest bits, in 16-bit words, so that a state, 12 bits
that end with a weight's own symbol, is a part of two neighbouring words: one shift and one mask. The first states of a
cycle, which begin with the symbols of its end, are put together and appended to the words. The shifts are those of the
row whose weight is decoded, so that the values are born in the order of the rows.

Runtimes keep folded tensors for a while: decoding takes few operators on whole matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mlorq.codecs.graph import Graph, hadamard, integers, sizes
from mlorq.codecs.packing import unpack_rows
from mlorq.codecs.rotation import hartley, signs
from mlorq.codecs.trellis import STATE_BITS, scale_values, stream, tables
from mlorq.memory import block_width

if TYPE_CHECKING:
    from torch import Tensor

WORD = 16  # bits of a stored word
DECODING_BYTES = 24  # per weight: six tensors of 4 bytes between the words and the weight
ROTATED = "m,xzm,qx,qbz->qbm"  # the scales of the rows, and two matrices


def values(graph: Graph, tensors: Mapping[str, Tensor], columns: int, bits: int) -> str:
    """The transposed weight, ``(columns, rows)`` float32, within 1e-6 of the decoder's."""
    rows, seed = len(tensors["scale"]), int(tensors["rotation"])
    width = columns
    if seed < -1:
        seed, width = -2 - seed, block_width(columns)
    single, high, low = _factors(width)
    odd = single * (columns // width)
    words = _words(unpack_rows(tensors["codes"], rows, bits).numpy(), bits)
    stored = words if seed < 0 else words.reshape(odd * high, low, words.shape[1])
    table = graph.node("Cast", graph.constant(tables()[bits - 1].astype(np.float16)), to="float32")
    packed = graph.codes(stored, DECODING_BYTES * columns * rows)
    found = graph.node("Gather", table, _states(graph, packed, rows, bits, stored.ndim - 1))
    codes = graph.node("Cast", graph.constant(tensors["scale"].numpy()), to="int32")
    scale = graph.node("Gather", graph.constant(scale_values()), codes)
    scale = graph.node("Mul", scale, graph.constant(tensors["base"].numpy()))
    if seed < 0:
        return graph.node("Mul", found, scale)
    # T = C ⊗ H ⊗ H as two products, by C ⊗ H and by H; the signs of the columns are those of the columns of H. Of all
    # blocks of columns, each with this T, it is (I ⊗ C) ⊗ H ⊗ H.
    odd_matrix = (hartley(single).numpy().astype(np.float32) / math.sqrt(width)).astype(np.float32)
    odd_matrix = np.kron(np.eye(columns // width, dtype=np.float32), odd_matrix)
    high_matrix = graph.node("Cast", graph.constant(hadamard(high).reshape(1, high, 1, high)), to="float32")
    low_matrix = graph.node("Cast", graph.constant(hadamard(low)), to="float32")
    left = graph.node("Mul", graph.constant(odd_matrix.reshape(odd, 1, odd, 1)), high_matrix)
    left = graph.node("Reshape", left, sizes(graph, odd * high, odd * high))
    sign = integers(graph, (signs(columns, seed).numpy() > 0).reshape(odd * high, low, 1).astype(np.uint8), "float32")
    two, one = (graph.constant(np.array(value, np.float32)) for value in (2, 1))
    right = graph.node("Mul", graph.node("Sub", graph.node("Mul", sign, two), one), low_matrix)
    found = graph.node("Einsum", scale, found, left, right, equation=ROTATED)
    return graph.node("Reshape", found, sizes(graph, columns, rows))


def _factors(columns: int) -> tuple[int, int, int]:
    """``columns = q · 2^a · 2^b`` with q odd."""
    power = columns & -columns
    high = 1 << (power.bit_length() - 1) // 2
    return columns // power, high, power // high


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The streams ``(columns, rows)`` of codes, first symbol in the highest bits: ``(columns, words)`` uint16."""
    columns, rows = codes.shape
    stored = np.zeros((columns, -(-rows * bits // WORD) * WORD), np.uint8)
    spread = (codes[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1
    stored[:, : rows * bits] = spread.reshape(columns, rows * bits)
    packed = np.packbits(stored, axis=1)
    return np.ascontiguousarray(packed).view(">u2").astype(np.uint16)


def _states(graph: Graph, stored: str, rows: int, bits: int, axis: int) -> str:
    """The states of all weights, int32, in the order of the rows, which are the axis ``axis`` of the words."""
    order = stream(rows)
    count = -(-rows * bits // WORD)
    words = graph.node("Cast", stored, to="int32")
    before = graph.node("Gather", words, integers(graph, (np.arange(count) - 1) % count), axis=axis)
    mask = graph.constant(np.array(2**STATE_BITS - 1, np.int32))
    before = graph.node("Mul", graph.node("BitwiseAnd", before, mask), graph.constant(np.array(2**WORD, np.int32)))
    windows = graph.node("Add", before, words)  # word h: 12 bits before it, and its own 16

    # A state that ends with bit e of the stream is in the window of the word that has this bit.
    ends = (np.arange(rows) + 1) * bits
    window, shift = (ends - 1) // WORD, -ends % WORD
    starts = np.repeat(order.bounds[:-1], np.diff(order.bounds))
    lasts = np.repeat(order.bounds[1:], np.diff(order.bounds)) - 1
    own = (np.arange(rows) - starts + 1) * bits  # bits of the cycle up to a symbol
    (split,) = np.nonzero(own < STATE_BITS)
    if len(split):
        high = _shifted(graph, windows, window[lasts[split]], shift[lasts[split]], axis)
        high = graph.node("BitwiseAnd", high, integers(graph, 2 ** (STATE_BITS - own[split]) - 1))
        low = _shifted(graph, windows, window[split], shift[split], axis)
        low = graph.node("BitwiseAnd", low, integers(graph, 2 ** own[split] - 1))
        joined = graph.node("Add", graph.node("Mul", high, integers(graph, 2 ** own[split])), low)
        windows = graph.node("Concat", windows, joined, axis=axis)
        window[split], shift[split] = count + np.arange(len(split)), 0
    found = _shifted(graph, windows, window[order.place], shift[order.place], axis)
    return graph.node("BitwiseAnd", found, mask)


def _shifted(graph: Graph, windows: str, window: np.ndarray, shift: np.ndarray, axis: int) -> str:
    """Chosen windows, each shifted to the right."""
    found = graph.node("Gather", windows, integers(graph, window), axis=axis)
    return graph.node("Div", found, integers(graph, 2**shift))
