"""Weights decoded in stages, so that onnxruntime holds the intermediate tensors of one stage at a time.

onnxruntime folds constants in passes over the graph (ten at most, as long as one changes something), and frees what no
operator reads any more after each: without stages it folds all weights in the first pass and holds all their
intermediate tensors. Here the codes of stage k are ``codes | 0ₖ``, where 0ₖ is a constant that only pass k + 1 finds:

    0ₖ = Quantize(Abs(Dequantize(0) + 0ₖ₋₁))

A ``Dequantize`` of constants is folded only together with one operator and a ``Quantize`` that follow it, which the sum
prevents; between passes onnxruntime removes sums with a constant 0. Other software sees constants like any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from mlorq.export_targets.onnx_graph.builder import GraphBuilder

STAGES = 9  # passes; the tenth finds nothing to do
SHRINKAGE = 6 / 7  # a weight takes some 4 of the 28 bytes of its decoding
LEAST_BYTES = 2**20  # of the intermediate tensors of a stage


def staged(
    builder: GraphBuilder, nodes: Sequence[onnx.NodeProto], stages: int = STAGES, least_bytes: int = LEAST_BYTES
) -> list[onnx.NodeProto]:
    """The nodes of a graph, so changed that they decode packed codes in stages.

    Args:
        builder: has the packed codes; gets constants.
        nodes: all nodes of the graph, in order; those that read packed codes are changed.
        stages: largest number of stages.
        least_bytes: of intermediate tensors, for a further stage.
    """
    nodes = list(nodes)
    stages = min(stages, sum(packed.decoding_bytes for packed in builder.packed.values()) // least_bytes)
    if stages < 2:
        return nodes
    one = builder.constant(np.array(1, np.float32))
    before = len(builder.nodes)
    zeros = ["mlorq.zero.0"]
    builder.write("Cast", (builder.constant(np.array(0, np.uint8)),), zeros, to="float32")
    for stage in range(1, stages):
        name = f"mlorq.zero.{stage}"
        point = builder.constant(np.array(stage, np.uint8))  # equal operators would be merged
        builder.write("DequantizeLinear", (point, one, point), [f"{name}.a"])
        builder.write("Add", (f"{name}.a", zeros[-1]), [f"{name}.b"])
        builder.write("Abs", (f"{name}.b",), [f"{name}.c"])
        builder.write("QuantizeLinear", (f"{name}.c", one), [f"{name}.d"])
        builder.write("Cast", (f"{name}.d",), [name], to="float32")
        zeros.append(name)
    renamed = {}
    for codes, stage in stages_of({name: one.decoding_bytes for name, one in builder.packed.items()}, stages).items():
        if stage:
            zero = builder.node("Cast", zeros[stage], to=builder.packed[codes].dtype)
            renamed[codes] = builder.node("BitwiseOr", codes, zero)
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    first = builder.nodes[before:]
    del builder.nodes[before:]
    return [*first, *nodes]


def stages_of(sizes: Mapping[str, int], stages: int) -> dict[str, int]:
    """The stage of every entry, from 0, in their order; each stage is about ``SHRINKAGE`` of the one before it.

    The weights of earlier stages are in memory as well, so that equal stages would have their peak in the last one.
    """
    parts = SHRINKAGE ** np.arange(stages)
    bounds = np.cumsum(parts)[:-1] / parts.sum()
    total, done = sum(sizes.values()), 0
    found = {}
    for name, size in sizes.items():
        found[name] = int((bounds <= (done + size / 2) / total).sum())
        done += size
    return found
