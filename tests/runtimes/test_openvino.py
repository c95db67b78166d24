"""Runtime ``openvino`` through ``mlorq.load``, and in ``mlorq benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mlorq
from mlorq.errors import CheckpointError, ConfigError, ModelError
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.long import few
from tests.nets import TokenNet, images

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("onnx", reason="needs the extra openvino")
pytest.importorskip("onnxscript", reason="needs the extra openvino")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS}
    module = compressed(zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS))
    return folder_of(tmp_path_factory.mktemp("vit") / "out", module, architecture)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=few(["exact", "fast"], "fast"))
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    """The checkpoint, loaded with a precision."""
    return mlorq.load(folder, runtime="openvino", precision=request.param, threads=1)


def test_a_checkpoint(model: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    precision = request.node.callspec.params["model"]
    pixels = zoo.pixels(3, 1)
    expected = mlorq.load(folder)(pixels)
    assert model.precision == precision
    found = model(pixels)
    assert found.dtype == torch.float32
    assert torch.equal(model(x=pixels), found)
    assert torch.equal(model(pixels.numpy()), found)
    assert (difference(found, expected) < 1e-5) == (precision == "exact")
    assert (model.nmse_added < 1e-9) == (precision == "exact")
    assert int(model.session.get_property("INFERENCE_NUM_THREADS")) == 1
    assert model.session.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@pytest.mark.long
def test_outputs_do_not_change_with_later_calls(folder: Path) -> None:
    model = mlorq.load(folder, runtime="openvino")
    first = model(zoo.pixels(2, 1))
    kept = first.clone()
    model(zoo.pixels(2, 2))
    assert torch.equal(first, kept)


def test_a_module_of_the_user(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TokenNet()
    module = compressed(net)
    folder_of(tmp_path, module, {"family": "custom"})
    model = mlorq.load(tmp_path, net, runtime="openvino", example=images(2, 3))
    assert difference(model(images(5, 4)), module(images(5, 4))) < 1e-5


def test_wrong_use(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="option 'precison'"):
        mlorq.load(folder, runtime="openvino", precison="fast")
    with pytest.raises(ConfigError, match="computes on the CPU"):
        mlorq.load(folder, device="cuda", runtime="openvino")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        mlorq.load(tmp_path / "missing.xml", runtime="openvino")
    assert "\n" not in str(caught.value)
    (tmp_path / "damaged.xml").write_text("<net")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        mlorq.load(tmp_path / "damaged.xml", runtime="openvino")
    assert "\n" not in str(caught.value)
    other = openvino.Model([openvino.opset15.constant(np.ones(3, np.float32))], [], "other")
    openvino.save_model(other, tmp_path / "other.xml")
    with pytest.raises(CheckpointError, match="not a model that mlorq exported"):
        mlorq.load(tmp_path / "other.xml", runtime="openvino")


def test_wrong_calls(model: Any) -> None:
    with pytest.raises(ModelError, match="the call lacks x: the graph takes x"):
        model()
    with pytest.raises(ModelError, match="OpenVINO: ") as failed:
        model(np.zeros((1, 3, 30, 30), np.float32))
    assert "\n" not in str(failed.value)


@pytest.mark.long
def test_files_from_any_file_system(folder: Path, tmp_path: Path) -> None:
    files = mlorq.export(folder, f"file://{tmp_path}/model.xml", to="openvino")
    pixels = zoo.pixels(3, 1)
    found = mlorq.load(files[0], runtime="openvino")(pixels)
    assert difference(found, mlorq.load(folder)(pixels)) < 1e-5


@pytest.mark.long
def test_the_benchmark_measures_it(folder: Path) -> None:
    from mlorq.runtimes.benchmark import benchmark

    found = benchmark(str(folder), ["openvino"], batches=(2,), turns=1, seconds=0.01)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["float", "exact", "fast"]
    assert all(row["runtime"] == "openvino" and row["resident"] > 0 for row in rows.values())
    assert rows["exact"]["bytes"] < rows["float"]["bytes"] * 2
    assert rows["exact"]["nmse_added"] < 1e-9 < rows["fast"]["nmse_added"]
    assert 1e-5 < rows["fast"]["difference"] < 1
