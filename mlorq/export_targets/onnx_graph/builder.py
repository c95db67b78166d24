"""``GraphBuilder``: constants and operators that are added to a graph, each written once."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "uint16": onnx.TensorProto.UINT16,
    "uint4": onnx.TensorProto.UINT4,
}
KERNEL_BITS = 4  # of onnxruntime
NAMES_OF_DTYPES = ("to", "output_dtype")  # attributes that are dtypes


class Packed(NamedTuple):
    """Packed codes of a graph.

    Attributes:
        dtype: name of their unsigned integers.
        decoding_bytes: of the tensors between them and the weights.
    """

    dtype: str
    decoding_bytes: int


class GraphBuilder:
    """Collects constants and operators (``mlorq.codecs.graph.Graph``).

    Args:
        kernel_bits: most bits of a weight in one product whose codes stay packed in memory.

    Attributes:
        kernel_bits: the same.
        overflows: whether an integer product can exceed 16 bits in a sum of two.
        initializers: the constants.
        nodes: operators in the order in which they were written.
        packed: packed codes by name, in the same order.
    """

    def __init__(self, kernel_bits: int = KERNEL_BITS) -> None:
        self.kernel_bits = kernel_bits
        self.overflows = False
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.packed: dict[str, Packed] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._written: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def constant(self, values: np.ndarray) -> str:
        """The name of a constant; equal ones are stored once."""
        values = np.asarray(values, order="C")
        key = (values.dtype.str, values.shape, hashlib.blake2b(values.tobytes(), digest_size=16).digest())
        if key not in self._constants:
            self._constants[key] = self._name()
            self.initializers.append(numpy_helper.from_array(values, self._constants[key]))
        return self._constants[key]

    def codes(self, values: np.ndarray, decoding_bytes: int) -> str:
        """The name of a constant of packed codes (``packed``)."""
        name = self.constant(values)
        self.packed[name] = Packed(str(values.dtype), decoding_bytes)
        return name

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """The name of an operator's first output; equal operators on equal inputs are written once."""
        key = (operator, inputs, repr(sorted(attributes.items())))
        if key not in self._written:
            first = self._written[key] = self._name()
            names = [first, *(f"{first}.{index}" for index in range(1, outputs))]
            self.write(operator, inputs, names, **attributes)
        return self._written[key]

    def write(self, operator: str, inputs: tuple[str, ...], outputs: list[str], **attributes: Any) -> None:
        """Write an operator whose outputs have given names."""
        values = dict(attributes)
        values |= {key: DTYPES[attributes[key]] for key in NAMES_OF_DTYPES if key in attributes}
        self.nodes.append(helper.make_node(operator, inputs, outputs, **values))

    def _name(self) -> str:
        self._count += 1
        return f"mlorq.{self._count}"
