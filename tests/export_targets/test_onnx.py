"""Target ``onnx``: every family's models, random codes of every form, against the torch model."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.checkpoint.io import inspect, save
from mlorq.checkpoint.places import FILES
from mlorq.checkpoint.preparation import described, placed
from mlorq.errors import CheckpointError, ConfigError
from mlorq.export_targets.graph_files import files_beside
from mlorq.extras import install_command
from mlorq.numbers import byte_count, number
from tests import detectors, zoo
from tests.compressed import compressed, folder_of
from tests.export_targets.graph_cases import (
    CASES,
    NMSE,
    assert_close,
    call,
    nmse,
    text_architecture,
    text_batch,
    trellis_folder,
)
from tests.long import few
from tests.nets import SharedNet, TokenNet, images

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The graph of a model of ``CASES``, compressed, which is made once."""

    @functools.cache
    def made(case: str) -> str:
        module, architecture, _ = CASES[case]()
        folder = folder_of(tmp_path_factory.mktemp(case) / "out", compressed(module), architecture)
        (file,) = mlorq.export(folder, folder.parent / "model.onnx")
        return file

    return made


def operators(file: str | Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("case", few(CASES, "vit", "bert"))
def test_families(case: str, graph_of: Callable[[str], str]) -> None:
    """At other numbers of samples and tokens than the example's; outputs of the same class."""
    module, _, batch = CASES[case]()
    module, file = compressed(module), graph_of(case)
    onnx.checker.check_model(file)
    graph = onnx.load(file)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", 21)]
    found, expected = call(mlorq.load(file, runtime="onnxruntime"), batch), call(module, batch)
    assert type(found) is type(expected)
    assert_close(found, expected)


@pytest.mark.parametrize("case", few(["swin", "bert"], "bert"))
def test_fast_adds_the_error_that_it_reports(case: str, tmp_path: Path) -> None:
    module, architecture, batch = CASES[case]()
    module = compressed(module)
    folder = folder_of(tmp_path / "out", module, architecture)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx", precision="fast")
    assert operators(file)["MatMulInteger"]
    model = mlorq.load(file, runtime="onnxruntime")
    added = nmse(call(model, batch), call(module, batch))
    assert 0 < added < NMSE
    assert model.nmse_added / 5 < added < model.nmse_added * 5, "of other inputs than at export"


def test_sentence_encoders_have_their_embedding(tmp_path: Path) -> None:
    from mlorq.models.sentence import SentenceEmbedding

    module = compressed(zoo.text_model("bert"))
    architecture = {
        **text_architecture(zoo.text_model("bert"), "sentence-similarity"),
        "pooling": ["cls", "mean"],
        "normalised": False,
    }
    folder = folder_of(tmp_path / "out", module, architecture)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx")
    batch = text_batch(3, 9)
    found = mlorq.load(file, runtime="onnxruntime").outputs(batch)
    with torch.no_grad():
        expected = SentenceEmbedding(("cls", "mean"), False)(module, batch)
    assert_close(found["sentence_embedding"], expected)


def test_the_file_has_the_checkpoints_size(tmp_path: Path) -> None:
    """Within 2 % for a model of some size, here one of 3 bits per weight without float embeddings."""
    folder = trellis_folder(tmp_path / "out")
    for precision in ("exact", "fast"):
        (file,) = mlorq.export(folder, tmp_path / f"{precision}.onnx", precision=precision)
        ratio = Path(file).stat().st_size / inspect(folder)["file_bytes"]
        assert abs(ratio - 1) < 0.02, ratio


def test_image_preprocessing_is_in_the_metadata(graph_of: Callable[[str], str]) -> None:
    entries = {entry.key: entry.value for entry in onnx.load(graph_of("vit")).metadata_props}
    described = json.loads(entries["preprocessing"])
    assert described["input_size"] == [3, 32, 32]
    assert {"mean", "std", "crop_pct", "interpolation"} <= described.keys()


def test_tokenizer_files_are_written_beside_the_file(tmp_path: Path) -> None:
    module = zoo.save_text_model(tmp_path / "float", "bert-classifier")
    architecture, own = text_architecture(module, "text-classification"), {"tokenizer.json": b"{}"}
    folder = folder_of(tmp_path / "out", compressed(module), architecture, preparation=described(own))
    save({**{name: (folder / name).read_bytes() for name in FILES}, **placed(own)}, folder)
    graph = str(tmp_path / "onnx" / "model.onnx")
    assert mlorq.export(folder, graph) == [graph, str(tmp_path / "onnx" / "tokenizer.json")]
    assert (tmp_path / "onnx" / "tokenizer.json").read_bytes() == b"{}"
    named = files_beside(graph, str(tmp_path / "float"), "onnx", own)
    assert {Path(file).name for file in named} == {"tokenizer.json", "tokenizer_config.json"}
    assert named[str(tmp_path / "onnx" / "tokenizer.json")] != b"{}"
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        mlorq.export(folder, tmp_path / "model.onnx", tokenizer=str(tmp_path / "out"))


QUANTIZERS = [
    (8, "uniform", "static"),
    (4, "uniform", "static"),
    (6, "repq", "static"),
    (4, "adalog", "static"),
    (4, "normalized", "static"),
    (4, "normalized", "token"),
]


@pytest.mark.parametrize("quantizer", few(QUANTIZERS, QUANTIZERS[0], QUANTIZERS[-1]))
def test_quantizers_of_activations(quantizer: tuple[int, str, str], tmp_path: Path) -> None:
    """Static ranges of inputs and of products are Q/DQ pairs; logarithms and ranges of tokens stay arithmetic."""
    bits, method, ranges = quantizer
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS)
    batches = [zoo.pixels(4, seed) for seed in range(2)]
    result = mlorq.compress(
        module,
        batches,
        budget="6bit",
        preset="quick",
        activations={"bits": bits, "method": method, "ranges": ranges},
        search=zoo.QUICK,
    )
    result.save(tmp_path / "out")
    expected = call(result.model, zoo.pixels(6, 9))
    (file,) = mlorq.export(tmp_path / "out", tmp_path / "model.onnx")
    count = operators(file)
    assert count["QuantizeLinear"] >= (8 if ranges == "static" else 1)
    assert count["QuantizeLinear"] <= count["DequantizeLinear"]
    found = call(mlorq.load(file, runtime="onnxruntime"), zoo.pixels(6, 9))
    # A value between two codes may fall on either side.
    assert nmse(found, expected) < 1e-3


@pytest.mark.long
def test_the_backbone_of_a_detector(tmp_path: Path) -> None:
    module = compressed(detectors.mask_rcnn())
    architecture = {"family": "detection", "name": detectors.NAME, "arguments": detectors.ARGUMENTS}
    folder = folder_of(tmp_path / "out", module, architecture)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx")
    pixels = zoo.pixels(3, 1, 64)
    found, expected = mlorq.load(file, runtime="onnxruntime")(pixels), call(module.backbone, pixels)
    assert type(found) is type(expected)
    assert_close(found, expected)


def test_a_part_of_a_model(tmp_path: Path) -> None:
    module, architecture, pixels = CASES["vit"]()
    module = compressed(module)
    folder = folder_of(tmp_path / "out", module, architecture)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx", part="patch_embed")
    assert_close(mlorq.load(file, runtime="onnxruntime")(pixels), call(module.patch_embed, pixels))
    with pytest.raises(CheckpointError, match="no module 'nothing'"):
        mlorq.export(folder, tmp_path / "model.onnx", part="nothing")


def test_modules_of_the_user(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TokenNet()
    module = compressed(net)
    folder = folder_of(tmp_path / "out", module, {"family": "custom"})
    with pytest.raises(CheckpointError, match="pass example=batch"):
        mlorq.export(folder, tmp_path / "model.onnx", model=net)
    with pytest.raises(CheckpointError, match="pass two or more"):
        mlorq.export(folder, tmp_path / "model.onnx", model=net, example=images(1, 0))
    with pytest.raises(CheckpointError, match="does not run on the example: Given normalized_shape"):
        mlorq.export(folder, tmp_path / "model.onnx", model=net, example=torch.zeros(2, 5, 3))
    (file,) = mlorq.export(folder, tmp_path / "model.onnx", model=net, example=images(2, 0))
    assert_close(mlorq.load(file, runtime="onnxruntime")(images(7, 1)), call(module, images(7, 1)))


class TrainedOtherwise(TokenNet):
    """Computes something else in training, as D-FINE's decoder does, and cannot be traced by torch.export."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x)
        return 2 * found if self.training or float(x.sum()) > 1e9 else found


def test_checks_are_made_in_eval_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TrainedOtherwise().eval()
    module = compressed(net)
    folder = folder_of(tmp_path / "out", module, {"family": "custom"})
    (file,) = mlorq.export(folder, tmp_path / "model.onnx", model=net, example=images(2, 0))
    assert_close(mlorq.load(file, runtime="onnxruntime")(images(3, 1)), call(module, images(3, 1)))


def test_weights_that_are_used_twice_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SharedNet(24)
    module = compressed(net)
    folder = folder_of(tmp_path / "out", module, {"family": "custom"})
    x = torch.randn(3, 4, 24)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx", model=net, example=x)
    assert_close(mlorq.load(file, runtime="onnxruntime")(x[:2]), call(module, x[:2]))
    largest = max(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer)
    assert largest < 24 * 24 * 4, "no dense weight"


class Branch(nn.Module):
    """Its layer runs twice if the sum of the input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found if bool(x.sum() > 0) else self.layer(found)


class Words(nn.Module):
    """Returns what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> str:
        return str(self.layer(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Branch, "depends on the values of inputs"), (Words, "returns str: an exported graph")],
)
def test_models_that_no_graph_can_hold(kind: type[nn.Module], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = kind()
    folder = folder_of(tmp_path / "out", compressed(net), {"family": "custom"})
    with pytest.raises(CheckpointError, match=message) as caught:
        mlorq.export(folder, tmp_path / "model.onnx", model=net, example=torch.randn(3, 16))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 is not supported: leave it out, for 21"),
        ({"precision": "half"}, "'exact' or 'fast'"),
        ({"precison": "fast"}, "known: .*precision"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        mlorq.export(tmp_path, tmp_path / "model.onnx", **options)


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ConfigError, match=re.escape(f"needs the package onnxscript: {install_command('onnx')}")):
        mlorq.export(tmp_path, tmp_path / "model.onnx")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    module, architecture, _ = CASES["vit"]()
    folder = folder_of(tmp_path / "out", compressed(module), architecture)
    file = tmp_path / "graph"
    assert main(["export", str(folder), "--to", "onnx", "--output", str(file), "--precision", "fast", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [str(file)]
    assert printed["precision"] == "fast"
    assert 0 < printed["nmse_added"] < NMSE
    assert printed["bytes"] == file.stat().st_size
    assert main(["export", str(folder), "--to", "onnx", "--output", str(file), "--precision", "fast"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert lines["bytes"] == byte_count(printed["bytes"])
    assert lines["difference"].startswith(f"{number(printed['difference'])} (largest error of one output value")
    assert "as a share of the largest output, on 7 random samples; below 1e-5 is rounding" in lines["difference"]
    assert lines["nmse_added"].startswith(number(printed["nmse_added"]))
    assert main(["export", str(folder), "--output", str(tmp_path / "x.safetensors"), "--precision", "fast"]) == 2
    error = capsys.readouterr().err.strip()
    assert "precision" in error
    assert len(error.splitlines()) == 1
