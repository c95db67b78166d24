"""``build``: the OpenVINO model of a compressed module, with all that a caller needs in its ``rt_info``."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset15 as operators
from torch import Tensor, nn

from mlorq.codecs.trellis_graph import ROTATED
from mlorq.errors import ModelError, one_line
from mlorq.export_targets.onnx_graph import build as onnx_build
from mlorq.export_targets.openvino_graph.decoding import HINTS, METADATA
from mlorq.scratch import scratch_folder

KERNEL_BITS = 8  # OpenVINO keeps codes of 2, 4 and 8 bits packed

INTEGERS = (openvino.Type.u8, openvino.Type.i32)  # of the operators that decode codes


class Built(NamedTuple):
    """A model with inputs and outputs of the module.

    Attributes:
        model: ``openvino.Model``.
        about: its metadata.
        checks: inputs, and what the module returns for them (``mlorq.export_targets.onnx_graph.build.Built``).
    """

    model: Any
    about: dict[str, Any]
    checks: list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def build(module: nn.Module, architecture: Mapping[str, Any], *, example: Any = None, part: str = "") -> Built:
    """The OpenVINO model of a compressed module.

    Args:
        module: the compressed module, on the CPU.
        architecture: its architecture, as in ``config.json``.
        example: a batch of at least two samples; None: the family makes one.
        part: name of the submodule to export; empty: the one that the family names, or the whole module.

    Raises:
        ModelError: there is no example, or the model, its inputs or its outputs cannot be exported.
    """
    # Without stages: ``decoding`` decodes one weight after the other.
    found = onnx_build.build(
        module, architecture, example=example, part=part, kernel_bits=KERNEL_BITS, stages=1, integers=False
    )
    about = onnx_build.metadata(found.model)
    del about["session_options"], about["precision"]
    about |= {"hints": HINTS, "names": [value.name for value in found.model.graph.output]}
    texts = {entry.key: entry.value for entry in found.model.metadata_props if entry.key != onnx_build.METADATA}
    try:
        model = openvino.Core().read_model(io.BytesIO(found.model.SerializeToString()))
    except Exception as error:  # OpenVINO's exceptions have no common class
        raise ModelError(f"OpenVINO cannot read the graph: {one_line(error)}") from error
    _correct(model)
    for key, value in texts.items():
        model.set_rt_info(value, key)
    set_metadata(model, about)
    return Built(model, about, found.checks)


def set_metadata(model: Any, about: Mapping[str, Any]) -> None:
    """Write the metadata of a model."""
    model.set_rt_info(json.dumps(about), METADATA)


def content(model: Any) -> tuple[bytes, bytes]:
    """A model as the content of its ``.xml`` and ``.bin`` files."""
    with scratch_folder() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return _shorter(path.read_text()).encode(), path.with_suffix(".bin").read_bytes()


def _shorter(graph: str) -> str:
    """The text of an ``.xml`` file without what OpenVINO infers: shapes between operators, and names of tensors.

    It is a large part of the files of a small model.
    """
    graph = re.sub(r">\s+<", "><", graph)
    graph = re.sub(r"<dim>-?\d+</dim>", "", graph)
    graph = re.sub(r"<input>.*?</input>", lambda found: re.sub(r' precision="\w+"', "", found[0]), graph)
    graph = re.sub(r' names="mlorq\.[^"]*"', "", graph)
    return graph.replace("></port>", "/>").replace(" />", "/>")


def _correct(model: Any) -> None:
    """Replace operators that OpenVINO's CPU plugin computes wrongly: shifts, rotations, casts to 4 bits."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("Divide", "Multiply") and node.get_output_element_type(0) in INTEGERS:
            found = _shifted(node)
        elif kind == "Einsum" and node.get_attributes()["equation"].replace(" ", "") == ROTATED:
            found = _rotated(node)
        elif kind == "Convert" and node.get_output_element_type(0) == openvino.Type.u4:
            found = node.input_value(0)
        else:
            found = None
        if found is not None:
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(found)
    _merge(model)
    model.validate_nodes_and_infer_types()


def _merge(model: Any) -> None:
    """Let equal constants, and equal casts of one value, be one: the conversion writes one for every reader."""
    written: dict[tuple[Any, ...], Any] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        key: tuple[Any, ...] | None = None
        if kind == "Constant":
            data = np.ascontiguousarray(node.output(0).get_node().data)
            digest = hashlib.blake2b(data.tobytes(), digest_size=16).digest()
            key = (str(node.get_element_type()), tuple(node.get_output_shape(0)), digest)
        elif kind == "Convert":
            source = node.input_value(0)
            key = (source.get_node().get_name(), source.get_index(), str(node.get_element_type()))
        if key is not None and written.setdefault(key, node) is not node:
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(written[key].output(0))


def _shifted(node: Any) -> Any | None:
    """A product or quotient of non-negative integers with powers of two as a shift; None for others.

    The CPU divides in float32, which has 24 bits, and rounds its powers of two down.
    """
    values = _known(node.input_value(1).get_node())
    if values is None or (values < 1).any():
        return None
    shifts = np.frexp(values.astype(np.float64))[1] - 1
    if not np.array_equal(2**shifts, values):
        return None
    kind = node.get_output_element_type(0)
    shift = operators.convert(operators.constant(shifts.astype(np.uint8)), kind)
    shifted = operators.bitwise_right_shift if node.get_type_name() == "Divide" else operators.bitwise_left_shift
    return shifted(node.input_value(0), shift).output(0)


def _known(node: Any) -> np.ndarray | None:
    """The integers that a node computes from constants: itself one, a cast, or a power; None for others."""
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data).astype(np.int64)
    if kind == "Convert":
        return _known(node.input_value(0).get_node())
    if kind == "Power":
        base, exponent = (_known(value.get_node()) for value in node.input_values())
        return None if base is None or exponent is None else np.asarray(np.power(base, exponent))
    return None


def _rotated(node: Any) -> Any:
    """The rotation of trellis codes as two products: OpenVINO 2026.4 computes its Einsum wrongly."""
    scale, values, left, right = node.input_values()
    q, b, m = node.get_output_shape(0)

    def shaped(value: Any, *shape: int) -> Any:
        return operators.reshape(value, operators.constant(np.array(shape, np.int64)), False)

    found = operators.matmul(left, shaped(values, q, b * m), False, False)
    found = operators.matmul(right, shaped(found, q, b, m), False, False)
    return operators.multiply(found, scale).output(0)
