"""Decoding in stages: onnxruntime folds one stage per pass, and everything is folded in the end."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.compressed import affine, trellis

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def test_stages_are_consecutive_and_shrink() -> None:
    from mlorq.export_targets.onnx_graph.stages import SHRINKAGE, stages_of

    found = list(stages_of({str(index): 10 for index in range(1000)}, 5).values())
    assert found == sorted(found)
    counts = np.bincount(found)
    assert len(counts) == 5
    for earlier, later in pairwise(counts):
        assert later / earlier == pytest.approx(SHRINKAGE, abs=0.02)
    assert stages_of({"a": 1}, 5).keys() == {"a"}


@pytest.mark.parametrize("stages", [1, 2, 4, 9])
def test_onnxruntime_decodes_one_stage_per_pass(stages: int, capfd: pytest.CaptureFixture[str]) -> None:
    import onnx
    import onnxruntime

    from mlorq.export_targets.onnx_graph.builder import GraphBuilder
    from mlorq.export_targets.onnx_graph.stages import staged

    matrices = [trellis(24, 16, 1 + seed % 3, seed) for seed in range(10)] + [affine(24, 16, 3, 0)]
    builder = GraphBuilder()
    weights = [one.codec.graph_values(builder, one.codec.pack(one), 16) for one in matrices]
    value = builder.node("Sum", *[builder.node("MatMul", "x", weight) for weight in weights])
    nodes = staged(builder, builder.nodes, stages, least_bytes=1)
    shape = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 16])
    output = onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, [2, 24])
    graph = onnx.helper.make_graph(nodes, "test", [shape], [output], builder.initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 0
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    log = capfd.readouterr()
    assert (log.out + log.err).count("ConstantFolding modified: 1") == stages
    x = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    (found,) = session.run(None, {"x": x})
    expected = sum(torch.from_numpy(x) @ matrix.dequantize().T for matrix in matrices)
    assert isinstance(expected, torch.Tensor)
    assert float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()) < 1e-5
    if stages > 1:
        assert {"mlorq.zero.1"} <= {name for node in nodes for name in node.output}
