"""``build``: the ONNX model of a compressed module, with all that a caller needs in its metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError, one_line
from mlorq.export_targets.graph_files import SAMPLES
from mlorq.export_targets.onnx_graph.builder import KERNEL_BITS
from mlorq.export_targets.onnx_graph.calls import Call, Flat, described, flat
from mlorq.export_targets.onnx_graph.float_graph import OPSET, float_graph, float_twin
from mlorq.export_targets.onnx_graph.layers import replace_weights
from mlorq.export_targets.onnx_graph.session import PRECISE
from mlorq.export_targets.onnx_graph.stages import STAGES
from mlorq.models import FAMILIES
from mlorq.models.batches import batch_samples, move_batch
from mlorq.models.observe import outputs_changed

METADATA = "mlorq"  # key of the metadata: one JSON object
PREPROCESSING = "preprocessing"  # key of the preparation of inputs, JSON as well
IR_VERSION = 10  # the first with 4-bit integers
# What onnxruntime has to be told: its defaults round x to 8 bits wherever weights have 4, and keep weights that were
# decoded at load in the memory that is reused between operators.
_COMMON = {
    "session.qdq_matmulnbits_block_size": "128",
    "session.use_device_allocator_for_initializers": "1",
}
SESSION_OPTIONS = {
    "exact": {**_COMMON, "session.qdq_matmulnbits_accuracy_level": "0"},
    "fast": {**_COMMON, "session.qdq_matmulnbits_accuracy_level": "4"},
}


class Built(NamedTuple):
    """An ONNX model with inputs and outputs of the module.

    Attributes:
        model: the model.
        checks: inputs, and what the module returns for them, by name: of the example, and of other values for all
            but one of its samples.
    """

    model: onnx.ModelProto
    checks: list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def build(
    module: nn.Module,
    architecture: Mapping[str, Any],
    *,
    precision: str = "exact",
    example: Any = None,
    part: str = "",
    kernel_bits: int = KERNEL_BITS,
    stages: int = STAGES,
    integers: bool = True,
) -> Built:
    """The ONNX model of a compressed module: opset 21, operators of the default domain, dynamic batch and sequence.

    Args:
        module: the compressed module, on the CPU.
        architecture: its architecture, as in ``config.json``.
        precision: ``exact``, or ``fast``: products may be rounded to 8 bits.
        example: a batch of at least two samples; None: the family makes one.
        part: name of the submodule to export; empty: the one that the family names, or the whole module.
        kernel_bits: most bits of a weight in one product whose codes stay packed in memory.
        stages: largest number of stages in which weights are decoded.
        integers: whether products of quantized activations are written for kernels of 8-bit integers.

    Raises:
        ModelError: there is no example, or the model, its inputs or its outputs cannot be exported.
    """
    family = FAMILIES[architecture["family"]]
    batch = example if example is not None else family.example_input(architecture, samples=SAMPLES)
    if batch is None:
        raise ModelError("the inputs of the model are not known: pass example=batch, a batch of two samples or more")
    if part:
        module, batch = _part(module, part, batch)
    else:
        part, batch = family.exported_part(architecture, batch)
        module = module.get_submodule(part)
    samples = batch_samples(batch)
    if samples < 2:
        raise ModelError("the example has one sample, and would be taken for the only size: pass two or more")
    batch = move_batch(batch, "cpu", torch.float32)
    twin, layers = float_twin(module)
    call = Call.of(twin, batch)
    values = list(batch.values()) if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else [*batch]
    inputs = dict(zip(call.names, values, strict=True))
    with torch.no_grad(), _recorded_calls(twin) as called:
        try:
            output = call.run(twin, values)
        except Exception as error:  # what a model raises, for images of a size that it does not take
            made = "inputs made for it; pass example=batch" if example is None else "the example"
            raise ModelError(f"the model does not run on {made}: {one_line(error)}") from error
        structure = described(output)
        extras = {} if part else family.derived_outputs(architecture)
        outputs = flat(output, structure)
    preprocessing = family.preprocess(architecture)
    axes = {name: _axes(name, value, samples, preprocessing or {}) for name, value in inputs.items()}
    model = float_graph(Flat(twin, call, structure, extras), inputs, [*outputs, *extras], axes)
    fast = precision == "fast"
    added, missing = replace_weights(
        model.graph, layers, fast=fast, kernel_bits=kernel_bits, stages=stages, integers=integers
    )
    for name in missing:
        if name in called and _matters(twin.get_submodule(name), lambda: flat(call.run(twin, values), structure)):
            raise ModelError(f"the exporter changed the weight of layer {name!r}: it is not in the graph")
    about = {
        "precision": precision,
        "call": call.to_json(),
        "outputs": structure,
        "part": part,
        "session_options": SESSION_OPTIONS[precision] | ({PRECISE: "1"} if added.overflows else {}),
        "architecture": {key: value for key, value in architecture.items() if key != "config"},
    }
    others = {name: _other(value, samples) for name, value in inputs.items()}
    with torch.no_grad():
        seen = flat(call.run(twin, list(others.values())), structure)
    return Built(_finished(model, axes, about, preprocessing), [(inputs, outputs), (others, seen)])


def metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """The JSON object in the metadata of a model; empty if there is none."""
    found = {entry.key: entry.value for entry in model.metadata_props}
    about: dict[str, Any] = json.loads(found.get(METADATA, "{}"))
    return about


def set_metadata(model: onnx.ModelProto, values: Mapping[str, Any]) -> None:
    """Add entries to the JSON object in the metadata of a model."""
    about = metadata(model) | dict(values)
    others = {entry.key: entry.value for entry in model.metadata_props if entry.key != METADATA}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA: json.dumps(about), **others})


@contextlib.contextmanager
def _recorded_calls(module: nn.Module) -> Iterator[set[str]]:
    """Names of the submodules that are called during a ``with`` block."""
    called: set[str] = set()
    handles = [
        child.register_forward_pre_hook(lambda _, __, name=name: called.add(name))
        for name, child in module.named_modules()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _part(module: nn.Module, name: str, batch: Any) -> tuple[nn.Module, Any]:
    """A submodule, and what it is called with when the model runs on a batch."""
    try:
        part = module.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no module {name!r}") from error
    seen: list[Any] = []
    handle = part.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                module(**batch)
            else:
                module(*batch) if isinstance(batch, tuple) else module(batch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"the model cannot be called with the example: {one_line(error)}") from error
    finally:
        handle.remove()
    if not seen:
        raise ModelError(f"module {name!r} is not called by the model")
    args, kwargs = seen[0]
    return part, kwargs if kwargs and not args else args


def _other(value: Tensor, samples: int) -> Tensor:
    """Other values of an input, without its first sample: a graph that took a value for a constant differs."""
    if value.dim() == 0 or value.shape[0] != samples:
        return value
    return -value[1:] if value.is_floating_point() else value[1:].flip(-1 if value.dim() > 1 else 0)


def _matters(layer: nn.Module, run: Callable[[], Mapping[str, Tensor]]) -> bool:
    """Whether an output depends on that of a layer: exporters leave out auxiliary heads that are not returned.

    Args:
        layer: the layer.
        run: returns the outputs by name.
    """
    with torch.no_grad():
        before = run()
        with outputs_changed([layer], lambda output: 2 * output + 1):
            after = run()
    return any(not torch.equal(value, after[name]) for name, value in before.items())


def _axes(name: str, value: Tensor, samples: int, preprocessing: Mapping[str, Any]) -> dict[int, str]:
    """Names of the axes of an input that may have any size; images and texts may differ in their number."""
    if value.dim() == 0 or value.shape[0] != samples:
        return {}
    texts = preprocessing.get("text_inputs")  # of a model of two towers
    if texts is not None:
        return {0: "texts", 1: "sequence"} if name in texts else {0: "images"}
    if preprocessing.get("kind") == "text" and value.dim() == 3:
        return {0: "batch", 1: "choices", 2: "sequence"}
    if preprocessing.get("kind") not in ("text", "audio") or value.dim() != 2:
        return {0: "batch"}
    return {0: "batch", 1: "decoder_sequence" if name.startswith("decoder_") else "sequence"}


def _finished(
    model: onnx.ModelProto, axes: Mapping[str, Mapping[int, str]], about: Mapping[str, Any], preprocessing: Any
) -> onnx.ModelProto:
    """The model with named axes, without what exporters add for debugging."""
    graph = model.graph
    names: dict[str, str] = {}
    for value in graph.input:
        for axis, name in axes.get(value.name, {}).items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
        value.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        node.ClearField("name")
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    for field in ("value_info", "metadata_props", "doc_string"):
        graph.ClearField(field)
    bodies = [graph.node, *(function.node for function in model.functions)]
    domains = {node.domain for body in bodies for node in body}
    own = [onnx.helper.make_opsetid("", OPSET)]
    own += [entry for entry in model.opset_import if entry.domain and entry.domain in domains]
    made = onnx.helper.make_model(graph, opset_imports=own, functions=list(model.functions), ir_version=IR_VERSION)
    made.producer_name = "mlorq"
    onnx.helper.set_model_props(made, {METADATA: json.dumps(about)})
    if preprocessing:
        entry = made.metadata_props.add()
        entry.key, entry.value = PREPROCESSING, json.dumps(preprocessing)
    return made
