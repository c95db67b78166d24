"""Runtime ``onnxruntime`` through ``mlorq.load``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mlorq
from mlorq.errors import CheckpointError, ConfigError, ModelError
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.nets import TokenNet, images

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS}
    module = compressed(zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS))
    return folder_of(tmp_path_factory.mktemp("vit") / "out", module, architecture)


@pytest.fixture(scope="module")
def graph(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint as a graph."""
    (file,) = mlorq.export(folder, tmp_path_factory.mktemp("graph") / "model.onnx")
    return file


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_checkpoint(precision: str, folder: Path) -> None:
    model = mlorq.load(folder, runtime="onnxruntime", precision=precision, threads=1)
    pixels = zoo.pixels(3, 1)
    expected = mlorq.load(folder)(pixels)
    assert model.precision == precision
    found = model(pixels)
    assert found.dtype == torch.float32
    assert torch.equal(model(x=pixels), found)
    assert torch.equal(model(pixels.numpy()), found)
    assert (difference(found, expected) < 1e-5) == (precision == "exact")
    assert (model.nmse_added < 1e-9) == (precision == "exact")


def test_weights_are_decoded_once(graph: str, tmp_path: Path) -> None:
    """No operator of the decoding is left in the session's graph, and none is run by a call."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    before = {node.op_type for node in onnx.load(graph).graph.node}
    after = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"Einsum", "BitwiseAnd", "BitShift", "DequantizeLinear"} <= before
    assert not {"Einsum", "BitwiseAnd", "BitShift", "DequantizeLinear"} & after
    assert "MatMulNBits" in after


def test_a_module_of_the_user(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TokenNet()
    module = compressed(net)
    folder_of(tmp_path, module, {"family": "custom"})
    model = mlorq.load(tmp_path, net, runtime="onnxruntime", example=images(2, 3))
    assert difference(model(images(5, 4)), module(images(5, 4))) < 1e-5


def test_outputs_of_any_structure(tmp_path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
            found = self.layer(x)
            return {"sum": found + y, "parts": (found, [found * 2, x])}

    net = Several()
    module = compressed(net)
    folder_of(tmp_path, module, {"family": "custom"})
    x, y = torch.randn(3, 24), torch.randn(3, 24)
    model = mlorq.load(tmp_path, net, runtime="onnxruntime", example=(x, y))
    found, expected = model(x[:2], y[:2]), module(x[:2], y[:2])
    assert found.keys() == expected.keys()
    assert type(found["parts"]) is tuple
    assert type(found["parts"][1]) is list
    for left, right in zip(
        (found["sum"], found["parts"][0], *found["parts"][1]),
        (expected["sum"], expected["parts"][0], *expected["parts"][1]),
        strict=True,
    ):
        assert difference(left, right) < 1e-5


def test_wrong_use(folder: Path, graph: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown runtime 'onnx'; did you mean 'onnxruntime'"):
        mlorq.load(folder, runtime="onnx")
    with pytest.raises(ConfigError, match="option 'precison'"):
        mlorq.load(folder, runtime="onnxruntime", precison="fast")
    with pytest.raises(ConfigError, match="computes on the CPU"):
        mlorq.load(folder, device="cuda", runtime="onnxruntime")
    with pytest.raises(CheckpointError, match="cannot be read"):
        mlorq.load(tmp_path / "missing.onnx", runtime="onnxruntime")
    (tmp_path / "other.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(CheckpointError, match="not a graph that mlorq exported"):
        mlorq.load(tmp_path / "other.onnx", runtime="onnxruntime")

    with pytest.raises(ConfigError, match="--precision fast"):
        mlorq.load(graph, runtime="onnxruntime", precision="fast")
    model = mlorq.load(graph, runtime="onnxruntime")
    with pytest.raises(ModelError, match="the call lacks x: the graph takes x"):
        model()
    with pytest.raises(ModelError, match="the call has y"):
        model(zoo.pixels(1, 0), y=zoo.pixels(1, 0))
    with pytest.raises(ModelError, match="onnxruntime: "):
        model(np.zeros((1, 3, 30, 30), np.float32))


def test_the_torch_runtime_takes_no_options(folder: Path) -> None:
    with pytest.raises(ConfigError, match="runtime torch: option 'precision'"):
        mlorq.load(folder, runtime="torch", precision="fast")
