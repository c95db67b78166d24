"""Target ``openvino``: every family's models, random codes of every form, against the torch model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mlorq
from mlorq.checkpoint.io import inspect
from mlorq.errors import CheckpointError, ConfigError
from mlorq.extras import install_command
from tests import zoo
from tests.compressed import compressed, folder_of, trellis
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
from tests.nets import TokenNet, images

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("onnx", reason="needs the extra openvino")
pytest.importorskip("onnxscript", reason="needs the extra openvino")


def size_of(files: list[str]) -> int:
    return sum(Path(file).stat().st_size for file in files)


@pytest.mark.parametrize("case", few(CASES, "vit"))
def test_families(case: str, tmp_path: Path) -> None:
    """At other numbers of samples and tokens than the example's; outputs of the same class; both precisions."""
    module, architecture, batch = CASES[case]()
    module = compressed(module)
    folder = folder_of(tmp_path / "out", module, architecture)
    files = mlorq.export(folder, tmp_path / "model.xml")
    assert [Path(file).name for file in files] == ["model.xml", "model.bin"]
    expected = call(module, batch)
    exact = mlorq.load(files[0], runtime="openvino")
    found = call(exact, batch)
    assert type(found) is type(expected)
    assert_close(found, expected)
    assert exact.nmse_added is not None
    assert exact.nmse_added < 1e-9

    fast = mlorq.load(files[0], runtime="openvino", precision="fast")
    assert fast.nmse_added is not None
    assert exact.nmse_added <= fast.nmse_added < NMSE
    assert nmse(call(fast, batch), expected) < max(1e-9, 5 * fast.nmse_added), "of other inputs than at export"


@pytest.mark.parametrize("case", few(["swin", "bert", "vit"], "bert"))
def test_openvino_alone_computes_the_same(case: str, tmp_path: Path) -> None:
    """Without the decoding of this software: the files are an ordinary model."""
    module, architecture, batch = CASES[case]()
    module = compressed(module)
    folder = folder_of(tmp_path / "out", module, architecture)
    files = mlorq.export(folder, tmp_path / "model.xml")
    core = openvino.Core()
    model = core.read_model(files[0])
    about = json.loads(model.get_rt_info("mlorq").astype(str))
    session = core.compile_model(model, "CPU", about["hints"]["exact"])
    values = batch if isinstance(batch, dict) else {about["call"]["names"][0]: batch}
    outputs = session({name: value.numpy() for name, value in values.items()})
    found = dict(
        zip(about["names"], (torch.from_numpy(np.array(outputs[i])) for i in range(len(outputs))), strict=True)
    )
    expected = call(module, batch)
    expected = {"output": expected} if isinstance(expected, torch.Tensor) else dict(expected)
    assert_close({name: found[name] for name in expected}, expected)


def test_codes_stay_packed(tmp_path: Path) -> None:
    """Weights of affine codes are constants of 2, 4 or 8 bits when OpenVINO compiles the model."""
    from mlorq.export_targets.openvino_graph.decoding import _decode, _weights
    from mlorq.forms.base import Candidate
    from mlorq.forms.modules import replace_layers
    from mlorq.forms.stored_layer import CompressedLayer
    from tests.compressed import affine

    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(9)))
    layers = {
        str(index): CompressedLayer(str(index), Candidate("Q", bits=bits), {"weight": affine(32, 32, bits, index)})
        for index, bits in enumerate(range(1, 9))
    }
    layers["8"] = CompressedLayer("8", Candidate("TCQ", bits=3), {"weight": trellis(32, 32, 3, 8)})
    module = nn.Sequential(*(nn.Linear(32, 32) for _ in range(9)))
    replace_layers(module, layers)
    folder = folder_of(tmp_path / "out", module.eval(), {"family": "custom"})
    x = torch.randn(3, 32)
    files = mlorq.export(folder, tmp_path / "model.xml", model=net, example=x)
    for precision, packed in (("exact", {"u2": 2, "u4": 2, "u8": 4}), ("fast", {"u2": 2, "u4": 2, "u8": 5})):
        core = openvino.Core()
        model = core.read_model(files[0])
        for weight in list(_weights(model)):
            _decode(core, weight, precision == "fast", {"INFERENCE_PRECISION_HINT": "f32"})
        model.validate_nodes_and_infer_types()
        kinds = Counter(
            node.get_element_type().get_type_name()
            for node in model.get_ordered_ops()
            if node.get_type_name() == "Constant" and list(node.get_output_shape(0)) == [32, 32]
        )
        assert {kind: count for kind, count in kinds.items() if kind != "f32"} == packed
        assert kinds["f32"] == (precision == "exact")
    assert_close(mlorq.load(files[0], runtime="openvino")(x), call(module, x))


@pytest.mark.long
def test_the_files_have_the_checkpoints_size(tmp_path: Path) -> None:
    """The codes within 2 %; the operators, which do not grow with the layers, take less than 10 % here."""
    folder = trellis_folder(tmp_path / "out")
    files = mlorq.export(folder, tmp_path / "model.xml")
    checkpoint = inspect(folder)["file_bytes"]
    graph, weights = (Path(file) for file in files)
    assert abs(weights.stat().st_size / checkpoint - 1) < 0.02
    assert size_of(files) < 1.1 * checkpoint
    text = graph.read_text()
    assert "<dim>" not in text
    constants = Counter(re.findall(r'<data element_type="i64" shape="" offset="(\d+)"', text))
    assert constants
    assert max(constants.values()) == 1, "equal constants are written once"


@pytest.mark.long
def test_what_is_in_the_metadata(tmp_path: Path) -> None:
    module, architecture, _ = CASES["vit"]()
    folder = folder_of(tmp_path / "out", compressed(module), architecture)
    files = mlorq.export(folder, tmp_path / "model.xml")
    model = openvino.Core().read_model(files[0])
    described = json.loads(model.get_rt_info("preprocessing").astype(str))
    assert described["input_size"] == [3, 32, 32]
    about = json.loads(model.get_rt_info("mlorq").astype(str))
    assert about["call"] == {"names": ["x"], "by_keyword": False}
    assert about["hints"]["exact"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert about["nmse_added"]["exact"] < about["nmse_added"]["fast"]


@pytest.mark.long
def test_tokenizer_files_and_the_embedding_of_sentence_encoders(tmp_path: Path) -> None:
    from mlorq.models.sentence import SentenceEmbedding

    module = zoo.save_text_model(tmp_path / "float", "bert")
    architecture = text_architecture(module, "sentence-similarity") | {"pooling": ["cls", "mean"], "normalised": False}
    module = compressed(module)
    folder = folder_of(tmp_path / "out", module, architecture)
    files = mlorq.export(folder, tmp_path / "ov" / "model.xml", tokenizer=str(tmp_path / "float"))
    names = {Path(file).name for file in files}
    assert names == {"model.xml", "model.bin", "tokenizer.json", "tokenizer_config.json"}
    batch = text_batch(3, 9)
    found = mlorq.load(files[0], runtime="openvino").outputs(batch)
    with torch.no_grad():
        assert_close(found["sentence_embedding"], SentenceEmbedding(("cls", "mean"), False)(module, batch))


@pytest.mark.long
@pytest.mark.parametrize("quantizer", [(8, "uniform"), (4, "uniform"), (4, "adalog")])
def test_quantizers_of_activations(quantizer: tuple[int, str], tmp_path: Path) -> None:
    bits, method = quantizer
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS)
    batches = [zoo.pixels(4, seed) for seed in range(2)]
    result = mlorq.compress(
        module, batches, budget="6bit", preset="quick", activations={"bits": bits, "method": method}, search=zoo.QUICK
    )
    result.save(tmp_path / "out")
    expected = call(result.model, zoo.pixels(6, 9))
    files = mlorq.export(tmp_path / "out", tmp_path / "model.xml")
    found = call(mlorq.load(files[0], runtime="openvino"), zoo.pixels(6, 9))
    # A value between two codes may fall on either side.
    assert nmse(found, expected) < 1e-3


def test_modules_of_the_user(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TokenNet()
    module = compressed(net)
    folder = folder_of(tmp_path / "out", module, {"family": "custom"})
    with pytest.raises(CheckpointError, match=r"export to openvino: .*pass example=batch"):
        mlorq.export(folder, tmp_path / "model.xml", model=net)
    files = mlorq.export(folder, tmp_path / "model.xml", model=net, example=images(2, 0))
    assert_close(mlorq.load(files[0], runtime="openvino")(images(7, 1)), call(module, images(7, 1)))


def test_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    with pytest.raises(ConfigError, match=r"known: .*tokenizer"):
        mlorq.export(tmp_path, tmp_path / "model.xml", precison="fast")
    with pytest.raises(ConfigError, match=r"does not end with \.xml"):
        mlorq.export(tmp_path, tmp_path / "model.bin", to="openvino")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    message = re.escape(f"needs the package openvino: {install_command('openvino')}")
    with pytest.raises(ConfigError, match=message):
        mlorq.export(tmp_path, tmp_path / "model.xml")
    with pytest.raises(ConfigError, match=message):
        mlorq.load(tmp_path, runtime="openvino")


@pytest.mark.long
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    module, architecture, _ = CASES["vit"]()
    folder = folder_of(tmp_path / "out", compressed(module), architecture)
    file = tmp_path / "model.xml"
    assert main(["export", str(folder), "--to", "openvino", "--output", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [str(file), str(tmp_path / "model.bin")]
    assert printed["bytes"] == size_of(printed["files"])
    assert printed["difference"] < 1e-5
    assert 0 < printed["nmse_added"]["fast"] < NMSE
