"""Exported graphs in onnxruntime: ``OnnxModel`` is called as the torch model is, and returns the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import fsspec
import numpy as np
import torch
from torch import Tensor

from mlorq.artifacts.transfer import os_errors
from mlorq.errors import CheckpointError, ModelError, one_line
from mlorq.export_targets.onnx_graph.calls import Call, rebuilt
from mlorq.forms.in_memory import release_memory

METADATA = "mlorq"  # key of the metadata: one JSON object
# Kernels of x86 processors without VNNI add two products of uint8 and int8 in 16 bits, which saturate without a word.
# With this option onnxruntime multiplies uint8 by uint8 instead, also where int8 is exact and faster.
PRECISE = "session.x64quantprecision"
METADATA_FIELD = 14  # of a ModelProto: key is field 1, value is field 2
# Differences from the model, relative to the largest output, from which a graph does not compute the same function.
# Rounding of sums makes 1e-6 to 1e-5. Where values are rounded to codes, some fall on the other side.
WRONG, WRONG_IF_ROUNDED = 1e-4, 1.0
ROUNDING = 1e-6  # a relative change of inputs that a function which does not jump hardly shows


class OnnxModel:
    """A compressed model in onnxruntime, called as the torch model.

    Args:
        source: path or fsspec URL of an exported file, or its content.
        threads: threads of one operator; None: as many as torch uses.

    Attributes:
        session: the session of onnxruntime.
        precision: ``exact`` or ``fast``.
        nmse_added: NMSE between the outputs of this graph and of the torch model, on the example of the export.
        metadata: the JSON object in the file's metadata.

    Raises:
        CheckpointError: the file is missing, is not an exported model, or onnxruntime refuses it.
    """

    def __init__(self, source: str | bytes, threads: int | None = None) -> None:
        import onnxruntime

        self.metadata = read_metadata(source)
        self.precision: str = self.metadata["precision"]
        self.nmse_added: float | None = self.metadata.get("nmse_added")
        self._call = Call.from_json(self.metadata["call"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors
        for key, value in options_here(self.metadata["session_options"]).items():
            options.add_session_config_entry(key, value)
        content = source if isinstance(source, bytes) or "://" not in source else _content(source)
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise CheckpointError(f"onnxruntime cannot load the graph: {one_line(error)}") from error
        del content
        release_memory()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the torch model, as it returns them; inputs may be tensors or NumPy arrays.

        Raises:
            ModelError: an input is missing or unknown.
        """
        values = self._call.tensors(args, kwargs)
        structure = self.metadata["outputs"]
        return rebuilt(self.outputs(values), structure)

    def outputs(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """All outputs of the graph by name, also those that the torch model does not have.

        Args:
            inputs: tensors or NumPy arrays by name.
        """
        arrays = {
            name: np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
            for name, value in inputs.items()
        }
        wanted = {one.name: one.type for one in self.session.get_inputs()}
        arrays = {name: _as_wanted(value, wanted[name]) for name, value in arrays.items() if name in wanted}
        names = [one.name for one in self.session.get_outputs()]
        try:
            found = self.session.run(names, arrays)
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise ModelError(f"onnxruntime: {one_line(error)}") from error
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    def eval(self) -> OnnxModel:
        """The model itself, which only computes in eval mode."""
        return self


def options_here(options: Mapping[str, str]) -> dict[str, str]:
    """The options of a file without those that this processor does not need."""
    return {key: value for key, value in options.items() if key != PRECISE or overflows()}


@functools.cache
def overflows() -> bool:
    """Whether onnxruntime's products of uint8 and int8 saturate on this processor, by computing one."""
    import onnx
    import onnxruntime

    left, right = np.full((8, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "overflows",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, left.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, (8, 32))],
        [onnx.numpy_helper.from_array(right, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": left})
    return bool((found != 64 * 255 * 127).any())


def _as_wanted(value: np.ndarray, kind: str) -> np.ndarray:
    """An array in the dtype of an input: any numbers for floats, and integers of any width for integers."""
    if kind == "tensor(float)":
        return value.astype(np.float32)
    return value.astype(np.int64) if kind == "tensor(int64)" and value.dtype.kind in "iub" else value


def checked(
    outputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    checks: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    *,
    rounded: bool,
    target: str,
) -> tuple[float, float]:
    """The largest difference of a graph from the torch model on all checks, and its NMSE on the first.

    Args:
        outputs: the graph: its outputs for inputs.
        checks: inputs, and what the torch model returns for them.
        rounded: whether values are rounded to codes in the graph.
        target: name of the export target, for errors.

    Raises:
        CheckpointError: the graph does not run, or does not compute the same function.
    """
    try:
        measured = [compared(outputs(inputs), expected) for inputs, expected in checks]
    except ModelError as error:
        raise CheckpointError(
            f"export to {target}: the graph does not run on other numbers of samples: {error}"
        ) from error
    difference, nmse = max(one for one, _ in measured), measured[0][1]
    allowed = WRONG_IF_ROUNDED if rounded else WRONG
    if not difference <= allowed:
        found = f"export to {target}: the graph differs from the model by {difference:.1e} of the largest output"
        jump = _jump(outputs, checks[0][0])
        if not jump <= allowed:
            raise CheckpointError(
                f"{found}; so does the graph from itself ({jump:.1e}) where its inputs change by rounding, as when "
                "a top-k chooses among equal scores, so that no comparison decides: pass other inputs as example="
            )
        raise CheckpointError(
            f"{found}: exporters do not see what depends on the values of inputs in Python; write it with torch.where"
        )
    return difference, nmse


def _jump(outputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], inputs: Mapping[str, Tensor]) -> float:
    """How far the graph's outputs move, relative to the largest, where its inputs change in their last digits."""
    moved = {name: value * (1 + ROUNDING) if value.is_floating_point() else value for name, value in inputs.items()}
    return compared(outputs(moved), outputs(inputs))[0]


def compared(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
    """Largest difference, relative to the largest output, and NMSE; each the worst of the floating-point outputs.

    Raises:
        ModelError: an output has another shape.
    """
    differences, errors = [0.0], [0.0]
    for name, wanted in expected.items():
        if wanted.is_floating_point():
            left, right = found[name].double(), wanted.double()
            if left.shape != right.shape:
                raise ModelError(f"output {name!r} has shape {tuple(left.shape)} instead of {tuple(right.shape)}")
            finite = right.isfinite()
            delta = (left - right)[finite]
            if delta.numel():
                least = torch.finfo(torch.float64).tiny
                differences.append(float(delta.abs().max() / right[finite].abs().max().clamp(min=least)))
                errors.append(float(delta.square().sum() / right[finite].square().sum().clamp(min=least)))
    return max(differences), max(errors)


def read_metadata(source: str | bytes) -> dict[str, Any]:
    """The JSON object in the metadata of an exported file, and its size as ``bytes``; the graph is not read.

    Args:
        source: path or fsspec URL of the file, or its content.

    Raises:
        CheckpointError: the file is missing, or was not exported by this software.
    """
    import io

    name = "the graph" if isinstance(source, bytes) else source
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _opened(source) as file:
            entries, size = _entries(file)
        about: dict[str, Any] = json.loads(entries[METADATA])
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {one_line(error)}") from error
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{name} is not a graph that mlorq exported: export the checkpoint again") from error
    return about | {"bytes": size}


def _entries(file: BinaryIO) -> tuple[dict[str, str], int]:
    """The metadata of a serialized ModelProto, and its size; all other fields are skipped."""
    found: dict[str, str] = {}
    size = file.seek(0, 2)
    file.seek(0)
    while file.tell() < size:
        field, kind = divmod(_varint(file), 8)
        if kind == 0:
            _varint(file)
        elif kind == 2:
            length = _varint(file)
            if field == METADATA_FIELD:
                key, value = _strings(file.read(length))
                found[key] = value
            else:
                file.seek(length, 1)
        else:
            raise ValueError(f"field of kind {kind}")
    return found, size


def _strings(entry: bytes) -> tuple[str, str]:
    """Key and value of a serialized entry."""
    import io

    file, parts = io.BytesIO(entry), {}
    while file.tell() < len(entry):
        field = _varint(file) // 8
        parts[field] = file.read(_varint(file)).decode()
    return parts[1], parts.get(2, "")


def _varint(file: BinaryIO) -> int:
    """A number in groups of 7 bits, least significant first."""
    value, shift = 0, 0
    while True:
        (byte,) = file.read(1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7


def _opened(location: str) -> BinaryIO:
    with os_errors():
        file: BinaryIO = fsspec.open(location, "rb").open()
    return file


def _content(location: str) -> bytes:
    with _opened(location) as file:
        return file.read()
