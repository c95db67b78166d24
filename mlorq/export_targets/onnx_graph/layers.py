"""Dense weights of a graph replaced by operators that decode the codes of compressed layers.

Weights are found by value: exporters rename and transpose them. A product with a weight becomes the products of its
form's matrices; a look-up decodes the rows that it reads; any other use reads the decoded weight. A product whose
other operand is dequantized 8-bit integers becomes one that runtimes compute from integers, if the matrix has codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from mlorq.codecs.graph import product, sizes
from mlorq.export_targets.onnx_graph.builder import KERNEL_BITS, GraphBuilder
from mlorq.export_targets.onnx_graph.stages import STAGES, staged
from mlorq.forms.base import Shape
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import CompressedEmbedding
from mlorq.models.direct import weight_of
from mlorq.models.kinds import BY_NAME


@dataclass(frozen=True)
class Found:
    """A layer's weight in a graph.

    Attributes:
        layer: the layer.
        transposed: whether the graph has it as ``(in_features, out_features)``.
        shape: the graph's shape of a table whose look-up of all rows the exporter has computed; None for other weights.
    """

    layer: CompressedModule
    transposed: bool
    shape: tuple[int, ...] | None = None


def replace_weights(
    graph: onnx.GraphProto,
    layers: Mapping[str, CompressedModule],
    *,
    fast: bool,
    kernel_bits: int = KERNEL_BITS,
    stages: int = STAGES,
    integers: bool = True,
) -> tuple[GraphBuilder, list[str]]:
    """Replace the weights of compressed layers in a graph, in place.

    Args:
        graph: the graph of the float model with the layers' dense weights.
        layers: the layers by name.
        fast: whether products may be rounded to 8 bits.
        kernel_bits: most bits of a weight in one product whose codes stay packed in memory.
        stages: largest number of stages in which weights are decoded.
        integers: whether products of quantized activations are written for kernels of 8-bit integers.

    Returns:
        The constants and operators that were added, and the names of layers whose weights are not in the graph.
    """
    weights = _find(graph, layers)
    writer = _Writer(GraphBuilder(kernel_bits), weights, fast, _dequantized(graph) if integers else frozenset())
    inside = {name for node in graph.node for name in _inner_inputs(node)}
    nodes: list[onnx.NodeProto] = []

    def flush() -> None:
        nodes.extend(writer.builder.nodes)
        writer.builder.nodes.clear()

    for name in weights:
        if name in inside or any(output.name == name for output in graph.output):
            writer.write_weight(name)
    for node in graph.node:
        replaced = writer.rewrite(node)
        flush()
        if not replaced:
            nodes.append(node)
    nodes = staged(writer.builder, nodes, stages)
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    for field, values in (("node", nodes), ("initializer", [*kept, *writer.builder.initializers])):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    matched = {id(found.layer) for found in weights.values()}
    return writer.builder, [name for name, layer in layers.items() if id(layer) not in matched]


class _Writer:
    """Rewrites the nodes of a graph that read weights.

    Args:
        builder: gets the operators.
        weights: the weights by name.
        fast: whether products may be rounded to 8 bits.
        dequantized: values whose products are those of integers.
    """

    def __init__(self, builder: GraphBuilder, weights: Mapping[str, Found], fast: bool, dequantized: Set[str]) -> None:
        self.builder = builder
        self._dequantized = dequantized
        self._weights = dict(weights)
        self._fast = fast
        self._decoded: set[str] = set()

    def rewrite(self, node: onnx.NodeProto) -> bool:
        """Write the operators in place of a node; False: it stays, and its weights are decoded."""
        kind, inputs = node.op_type, list(node.input)
        found = self._weights.get(inputs[1]) if len(inputs) > 1 else None
        if kind == "MatMul" and found is not None and found.transposed:
            self._name(self._product(inputs[0], found.layer), node.output[0])
            return True
        if kind == "Gemm" and found is not None and _is_linear(node, found):
            output = self._product(inputs[0], found.layer)
            if len(inputs) > 2:
                # Not as a sum, which onnxruntime makes a Gemm of floats again.
                output = self.builder.node("Sub", output, self.builder.node("Neg", inputs[2]))
            self._name(output, node.output[0])
            return True
        data = self._weights.get(inputs[0]) if inputs else None
        data = data if data is not None and data.shape is None else None
        if kind == "Gather" and data is not None and self._is_lookup(node, data):
            self._name(self._rows(inputs[1], data.layer), node.output[0])
            return True
        if kind == "Transpose" and data is not None and not data.transposed and len(data.layer.weight_shape) == 2:
            # What reads the transposed weight is a product.
            self._weights[node.output[0]] = Found(data.layer, True)
            return True
        for name in inputs:
            if name in self._weights:
                self.write_weight(name)
        return False

    def write_weight(self, name: str) -> None:
        """Write the decoded weight under its name, in the layout that the graph has."""
        if name in self._decoded:
            return
        self._decoded.add(name)
        found = self._weights[name]
        value, shape = self._weight(found.layer), found.layer.weight_shape
        if not found.transposed and not BY_NAME[found.layer.kind].is_transposed:
            value = self.builder.node("Transpose", value, perm=[1, 0])
        if len(shape) > 2:
            value = self.builder.node("Reshape", value, sizes(self.builder, *shape))
        if found.shape is not None:
            value = self.builder.node("Reshape", value, sizes(self.builder, *found.shape))
        self._name(value, name)

    def _name(self, value: str, name: str) -> None:
        self.builder.write("Identity", (value,), [name])

    def _is_lookup(self, node: onnx.NodeProto, found: Found) -> bool:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        return isinstance(found.layer, CompressedEmbedding) and axis == 0 and not found.transposed

    def _weight(self, layer: CompressedModule) -> str:
        """The transposed weight."""
        values = {
            name: codec.graph_values(self.builder, tensors, columns)
            for name, (tensors, columns, codec) in layer.packed().items()
        }
        return layer.form.graph_weight(self.builder, values)

    def _product(self, inputs: str, layer: CompressedModule) -> str:
        packed = layer.packed()
        shape = Shape(layer.weight_shape[0], int(np.prod(layer.weight_shape[1:])))
        if layer.form.multiplies_out(layer.candidate, shape):
            return self._multiplied(product, inputs, self._weight(layer))

        def multiply(name: str, value: str, _: bool) -> str:
            tensors, columns, codec = packed[name]
            return self._multiplied(codec.graph_product, value, tensors, columns)

        output: str = layer.form.apply(multiply, inputs, lambda left, right: self.builder.node("Add", left, right))
        return output

    def _multiplied(self, write: Callable[..., str], inputs: str, *matrix: Any) -> str:
        return write(self.builder, inputs, *matrix, fast=self._fast, integers=inputs in self._dequantized)

    def _rows(self, indices: str, layer: CompressedModule) -> str:
        ((tensors, columns, codec),) = layer.packed().values()
        return codec.graph_rows(self.builder, indices, tensors, columns)


def _find(graph: onnx.GraphProto, layers: Mapping[str, CompressedModule]) -> dict[str, Found]:
    """The constants of a graph that are weights of layers, by name."""
    known: dict[tuple[tuple[int, ...], bytes], Found] = {}
    for layer in layers.values():
        weight = weight_of(layer).detach().float().numpy()
        known[_fingerprint(weight)] = Found(layer, False)
        if weight.ndim == 2:
            known.setdefault(_fingerprint(weight.T), Found(layer, True))
        layer.drop_cache()
    shapes = {shape for shape, _ in known}
    found = {}
    for tensor in graph.initializer:
        if tuple(tensor.dims) in shapes and tensor.data_type == onnx.TensorProto.FLOAT:
            match = known.get(_fingerprint(numpy_helper.to_array(tensor)))
            if match is not None:
                found[tensor.name] = match
        elif len(tensor.dims) == 3 and tuple(tensor.dims[1:]) in shapes and tensor.dims[0] == 1:
            match = known.get(_fingerprint(numpy_helper.to_array(tensor)[0]))
            if match is not None and isinstance(match.layer, CompressedEmbedding) and not match.transposed:
                found[tensor.name] = replace(match, shape=tuple(tensor.dims))
    return found


def _dequantized(graph: onnx.GraphProto) -> frozenset[str]:
    """The values of a graph that are dequantized uint8, with one scale for all."""
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def is_integer(node: onnx.NodeProto) -> bool:
        scale, point = (constants.get(name) for name in node.input[1:])
        return scale is not None and point is not None and not scale.dims and point.data_type == onnx.TensorProto.UINT8

    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear" and len(node.input) == 3]
    return frozenset(node.output[0] for node in pairs if is_integer(node))


def _fingerprint(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()


def _is_linear(node: onnx.NodeProto, found: Found) -> bool:
    """Whether a Gemm is ``x Wᵀ + b``."""
    given = {attribute.name: attribute.f if attribute.type == 1 else attribute.i for attribute in node.attribute}
    scaled = (given.get("alpha", 1.0), given.get("beta", 1.0)) != (1.0, 1.0)
    return not scaled and not given.get("transA", 0) and bool(given.get("transB", 0)) != found.transposed


def _inner_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the subgraphs of a node read."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _inner_inputs(inner)
