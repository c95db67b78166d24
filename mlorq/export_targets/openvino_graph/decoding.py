"""``compiled``: an exported model compiled by OpenVINO, its weights decoded one after the other before that.

OpenVINO would decode all weights at once and keep every intermediate tensor. Here each weight is the output of a model
of its own, which is run and freed; codes become constants of 2, 4 or 8 bits, with the operators that OpenVINO's kernels
recognise, so that they stay packed in memory. This module does not need torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset15 as operators

METADATA = "mlorq"  # key of the metadata: one JSON object
LEAST = 64  # entries of a weight; OpenVINO folds smaller constants
CENTRE, LARGEST = 128, 127  # of weights rounded to 8 bits
# What OpenVINO has to be told: by default it takes bfloat16 where the processor has it, and may round inputs to 8 bits.
_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "PERFORMANCE_HINT": "LATENCY",
}
HINTS = {"exact": _EXACT, "fast": _EXACT | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}}


class Weight(NamedTuple):
    """The right operand of products, computed from constants.

    Attributes:
        output: its value, ``(K, N)`` float32.
        parts: codes, zero-points and scales, if the value is ``(codes - zero-points) · scales``; codes as bytes.
        readers: what reads it.
    """

    output: Any
    parts: tuple[Any, Any, Any] | None
    readers: list[Any]


def compiled(core: Any, model: Any, precision: str, threads: int) -> Any:
    """A compiled model; the model itself is changed.

    Args:
        core: ``openvino.Core``.
        model: ``openvino.Model`` with metadata.
        precision: ``exact``, or ``fast``: decoded weights and inputs of products are rounded to 8 bits.
        threads: threads of an operator.
    """
    about = json.loads(model.get_rt_info(METADATA).astype(str))
    settings = {**about["hints"][precision], "INFERENCE_NUM_THREADS": threads}
    for weight in list(_weights(model)):
        _decode(core, weight, precision == "fast", settings)
    model.validate_nodes_and_infer_types()
    return core.compile_model(model, "CPU", settings)


def _weights(model: Any) -> Iterator[Weight]:
    """What is computed from constants alone and read by other operators."""
    constant: set[str] = set()
    ordered = model.get_ordered_ops()
    for node in ordered:
        inputs = node.input_values()
        if node.get_type_name() == "Constant" or (
            inputs and all(value.get_node().get_name() in constant for value in inputs)
        ):
            constant.add(node.get_name())
    for node in ordered:
        if node.get_name() not in constant or node.get_type_name() in ("Constant", "Result"):
            continue
        for output in node.outputs():
            readers = [reader for reader in output.get_target_inputs() if reader.get_node().get_name() not in constant]
            shape = output.get_partial_shape()
            floats = output.get_element_type() == openvino.Type.f32
            if readers and floats and shape.is_static and np.prod(shape.to_shape()) >= LEAST:
                yield Weight(output, _parts(output), readers)


def _parts(output: Any) -> tuple[Any, Any, Any] | None:
    """Codes, zero-points and scales of ``(codes - zero-points) · scales``; None for other values."""
    product = output.get_node()
    if product.get_type_name() != "Multiply":
        return None
    difference = product.input_value(0).get_node()
    if difference.get_type_name() != "Subtract" or len(output.get_shape()) != 2:
        return None
    codes = difference.input_value(0).get_node()
    if codes.get_type_name() != "Convert":
        return None
    stored = codes.input_value(0)
    if stored.get_element_type() != openvino.Type.u8:
        return None
    return stored, difference.input_value(1), product.input_value(1)


def _decode(core: Any, weight: Weight, fast: bool, settings: Mapping[str, Any]) -> None:
    """Replace a weight by constants, where it is read."""
    products = [
        reader
        for reader in weight.readers
        if (node := reader.get_node()).get_type_name() == "MatMul"
        and reader.get_index() == 1
        and not any(node.get_attributes()[name] for name in ("transpose_a", "transpose_b"))
        and len(weight.output.get_shape()) == 2
    ]
    others = [reader for reader in weight.readers if reader not in products]
    if products and (weight.parts or fast):
        if weight.parts:
            codes, zero, scale = _values(core, weight.parts, settings)
        else:
            codes, zero, scale = _rounded(*_values(core, (weight.output,), settings))
        value = _packed(codes, zero, scale)
        for node in [reader.get_node() for reader in products]:
            found = operators.matmul(node.input_value(0), value, False, True)
            found.set_friendly_name(node.get_friendly_name())
            _replace(node.output(0), found.output(0))
    else:
        others = weight.readers
    if others:
        (dense,) = _values(core, (weight.output,), settings)
        constant = operators.constant(dense)
        for reader in others:
            reader.replace_source_output(constant.output(0))


def _replace(old: Any, new: Any) -> None:
    """Let the readers of a value read another one, under the same names."""
    new.get_tensor().set_names(old.get_names())
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _values(core: Any, outputs: tuple[Any, ...], settings: Mapping[str, Any]) -> list[np.ndarray]:
    """Values that are computed from constants."""
    model = openvino.Model([operators.result(output) for output in outputs], [], "weight")
    found = core.compile_model(model, "CPU", dict(settings))([])
    return [np.array(found[index]) for index in range(len(outputs))]


def _rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight ``(K, N)`` as codes of 8 bits, with a scale per column."""
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / LARGEST
    codes = np.rint(weight / scale) + CENTRE
    return codes.astype(np.uint8), np.full(scale.shape, CENTRE, np.float32), scale.astype(np.float32)


def _packed(codes: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> Any:
    """The transposed weight ``(N, K)`` from packed codes ``(K, N)``."""
    shape = codes.shape[::-1]
    largest = int(codes.max())
    bits = next(bits for bits in (2, 4, 8) if largest < 2**bits)
    kind = {2: openvino.Type.u2, 4: openvino.Type.u4, 8: openvino.Type.u8}[bits]
    each = 8 // bits
    grouped = np.pad(codes.T.reshape(-1), (0, -codes.size % each)).reshape(-1, each)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    data = np.bitwise_or.reduce(grouped << shifts, axis=1).astype(np.uint8)
    tensor = openvino.Tensor(kind, openvino.Shape(shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = data
    weight = operators.convert(operators.constant(tensor), openvino.Type.f32)
    column = (-1, 1)
    points = np.broadcast_to(np.asarray(zero, np.float32).reshape(column), (shape[0], 1))
    scales = np.broadcast_to(np.asarray(scale, np.float32).reshape(column), (shape[0], 1))
    point = operators.convert(operators.constant(points.astype(np.uint8)), openvino.Type.f32)
    return operators.multiply(operators.subtract(weight, point), operators.constant(np.ascontiguousarray(scales)))


def release_memory() -> None:
    """Return what decoding used to the system, where the C library can."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
