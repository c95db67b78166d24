"""Codecs as operators: what onnxruntime computes from the packed codes is what the codecs decode."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
import torch

from mlorq import memory
from mlorq.codecs.base import Codec
from mlorq.codecs.graph import packed_codes, product
from tests.compressed import affine, trellis

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def run(
    builder: Any, output: str, feeds: dict[str, np.ndarray] | None = None, **entries: str
) -> tuple[np.ndarray, list[str]]:
    """The value of ``output``, and the operators that are left after constants are folded."""
    import onnxruntime

    from mlorq.export_targets.onnx_graph.build import SESSION_OPTIONS

    feeds = {"x": np.zeros(1, np.float32)} if feeds is None else feeds
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    graph = onnx.helper.make_graph(
        builder.nodes, "test", inputs, [onnx.helper.make_empty_tensor_value_info(output)], builder.initializers
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in (SESSION_OPTIONS["exact"] | entries).items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        left = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    (found,) = session.run([output], feeds)
    return found, left


def builder() -> Any:
    from mlorq.export_targets.onnx_graph.builder import GraphBuilder

    return GraphBuilder()


def relative(found: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_unpacked_whatever_their_number(bits: int) -> None:
    codes = affine(3, 7, bits, bits).codes.numpy()  # 21 codes: the last byte of a plane is not full
    graph = builder()
    found, left = run(graph, packed_codes(graph, codes, bits))
    assert np.array_equal(found, codes)
    assert not left


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("wide", [False, True])
def test_affine_values_products_and_rows(bits: int, wide: bool) -> None:
    matrix = affine(12, 10, bits, bits, wide=wide)
    tensors, codec = matrix.codec.pack(matrix), matrix.codec
    expected = matrix.dequantize()
    graph = builder()
    found, left = run(graph, codec.graph_values(graph, tensors, 10))
    assert np.array_equal(found, expected.T.numpy())
    assert not left

    x = np.random.default_rng(bits).standard_normal((2, 5, 10)).astype(np.float32)
    graph = builder()
    found, _ = run(graph, codec.graph_product(graph, "x", tensors, 10), {"x": x})
    assert relative(found, torch.from_numpy(x) @ expected.T) < 1e-5

    rows = np.array([[3, 0, 11], [7, 7, 1]], np.int64)
    graph = builder()
    found, _ = run(graph, codec.graph_rows(graph, "x", tensors, 10), {"x": rows})
    assert np.array_equal(found, expected[torch.from_numpy(rows)].numpy())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("wide", [False, True])
def test_affine_products_of_integers(bits: int, wide: bool) -> None:
    """The largest codes on both sides: kernels of processors without VNNI saturate unless the options forbid it."""
    matrix = affine(12, 64, bits, bits, wide=wide)
    matrix.codes[:3] = 2**bits - 1
    tensors = matrix.codec.pack(matrix)
    graph, x = builder(), np.random.default_rng(bits).integers(0, 256, (5, 64), np.uint8)
    x[:2] = 255
    scale, zero = graph.constant(np.array(0.02, np.float32)), graph.constant(np.array(3, np.uint8))
    product = matrix.codec.graph_product(
        graph, graph.node("DequantizeLinear", "x", scale, zero), tensors, 64, integers=True
    )
    fits = not wide or bits < 7  # whether the weight's zero-points fit int8
    assert graph.overflows == (fits and bits >= 7)
    found, left = run(graph, product, {"x": x}, **({"session.x64quantprecision": "1"} if graph.overflows else {}))
    expected = torch.from_numpy(0.02 * (x.astype(np.float64) - 3)) @ matrix.dequantize().double().T
    assert relative(found, expected) < 1e-6
    assert (left == ["MatMulIntegerToFloat"]) == fits


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (13, 24), (100, 48), (290, 7)])
@pytest.mark.parametrize("rotation", [-1, 0, 9])
def test_trellis_values(bits: int, rows: int, columns: int, rotation: int) -> None:
    """Cycles of all lengths, rows that do not fill a word, odd and even numbers of columns."""
    matrix = trellis(rows, columns, bits, bits + rows, rotation=rotation)
    graph = builder()
    found, left = run(graph, matrix.codec.graph_values(graph, matrix.codec.pack(matrix), columns))
    expected = matrix.dequantize().T
    assert relative(found, expected) < 1e-6
    assert np.array_equal(found, expected.numpy()) or rotation >= 0
    assert not left, "onnxruntime folds the decoding at load"


@pytest.mark.parametrize(("columns", "width"), [(48, 12), (40, 8), (21, 7)])
def test_trellis_values_rotated_in_blocks(columns: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ONE_BLOCK", columns - 1)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", width)
    matrix = trellis(30, columns, 3, 1, rotation=-2 - 9)
    graph = builder()
    found, left = run(graph, matrix.codec.graph_values(graph, matrix.codec.pack(matrix), columns))
    assert relative(found, matrix.dequantize().T) < 1e-6
    assert relative(found, trellis(30, columns, 3, 1, rotation=9).dequantize().T) > 0.1
    assert not left


def test_a_codec_without_operators_stores_its_values() -> None:
    matrix = affine(4, 6, 3, 1)
    graph = builder()
    found, _ = run(graph, Codec.graph_values(matrix.codec, graph, matrix.codec.pack(matrix), 6))
    assert np.array_equal(found, matrix.dequantize().T.numpy())


def test_products_by_integers_round_to_8_bits() -> None:
    generator = np.random.default_rng(0)
    x, weight = generator.standard_normal((3, 4, 64)), generator.standard_normal((64, 32))
    x[0] *= 1000  # rows have their own ranges
    weight[:, 5] = 0
    graph = builder()
    output = product(graph, "x", graph.constant(weight.astype(np.float32)), fast=True)
    found, left = run(graph, output, {"x": x.astype(np.float32)})
    expected = x @ weight
    error = np.square(found - expected).sum(axis=(1, 2)) / np.square(expected).sum(axis=(1, 2))
    assert (error < 1e-3).all()
    assert np.array_equal(found[..., 5], np.zeros((3, 4), np.float32))
    assert "QuantizeLinear" not in left
    assert "MatMul" not in left


def test_equal_constants_and_operators_are_written_once() -> None:
    graph = builder()
    first, second = trellis(24, 16, 3, 0), trellis(24, 16, 3, 1)
    for matrix in (first, second):
        matrix.codec.graph_values(graph, matrix.codec.pack(matrix), 16)
    # Of the second matrix: its words and its scale codes.
    alone = builder()
    first.codec.graph_values(alone, first.codec.pack(first), 16)
    assert len(graph.initializers) == len(alone.initializers) + 2
