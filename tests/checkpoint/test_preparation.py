"""The tokenizer in a checkpoint: carried by runs and exports, compared with its digests, and never looked up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import mlorq
from flows.render import console
from flows.render_checkpoint import print_checkpoint
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import inspect, save
from mlorq.checkpoint.places import FILES
from mlorq.checkpoint.preparation import described, placed, read_preparation
from mlorq.checkpoint.tensor_file import digest
from mlorq.errors import CheckpointError
from mlorq.export_targets.graph_files import NONE, files_beside
from tests import zoo
from tests.checkpoint.signing import edit
from tests.checkpoint.test_checkpoint import ALLOCATION, DESCRIPTION, Everything, compress

TOKENIZER = {"tokenizer.json": b'{"a": 1}', "vocab.txt": b"the\na\n"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of a classifier with its tokenizer, and the result of a run on it."""
    folder = tmp_path_factory.mktemp("run")
    zoo.save_text_model(folder / "model", "bert-classifier", seed=6)
    (folder / "model" / "secret.txt").write_text("of no tokenizer")
    (folder / "texts.csv").write_text("".join(f"{text},{i % 2}\n" for i, text in enumerate(zoo.SENTENCES)))
    data = {"source": "table", "path": "texts.csv", "text": [0], "label": 1, "batch_size": 4}
    model = {"family": "transformers", "name": "model/", "task": "text-classification"}
    values = {"model": model, "data": {"calibration": data, "evaluation": data}, "export": [{"to": "transformers"}]}
    return folder / "model", zoo.run(folder, values)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return with_tokenizer(tmp_path / "out", TOKENIZER)


def with_tokenizer(folder: Path, files: dict[str, bytes]) -> Path:
    model = compress(Everything(), ALLOCATION)
    save(checkpoint_files(model, {**DESCRIPTION, "preparation": described(files)}) | placed(files), folder)
    return folder


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_stores_the_tokenizer(run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    source, result = run
    checkpoint = Path(result["checkpoint"].removeprefix("file://"))
    names = {path.name for path in (checkpoint / "preparation").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert all((checkpoint / "preparation" / name).read_bytes() == (source / name).read_bytes() for name in names)
    (exported,) = result["exports"]
    assert names <= {file["name"] for file in exported["files"]}
    info = inspect(checkpoint)
    assert result["file_bytes"] == info["file_bytes"] == sum((checkpoint / name).stat().st_size for name in FILES)
    print_checkpoint(info, console())
    assert "tokenizer.json, tokenizer_config.json" in capsys.readouterr().out


def test_an_export_carries_the_tokenizer_on_a_machine_without_the_float_model(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    source, result = run
    shutil.copytree(result["checkpoint"].removeprefix("file://"), tmp_path / "checkpoint")
    hidden = source.rename(source.with_name("hidden"))
    try:
        files = [Path(file) for file in mlorq.export(tmp_path / "checkpoint", tmp_path / "hf", to="transformers")]
    finally:
        hidden.rename(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (written,) = (file for file in files if file.name == name)
        assert written.read_bytes() == (source / name).read_bytes()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "hf")(zoo.SENTENCES)
    assert tokens["input_ids"] == zoo.tokenizer()(zoo.SENTENCES)["input_ids"]
    assert "The folder has no tokenizer" not in (tmp_path / "hf" / "README.md").read_text()


def test_a_graph_does_not_replace_another_models_tokenizer(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, result = run
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is of another model: give another folder, or option"):
        mlorq.export(result["checkpoint"], tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert files_beside(str(tmp_path / "model.onnx"), NONE, "onnx", TOKENIZER) == {}
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER["tokenizer.json"])  # an earlier export
    found = files_beside(str(tmp_path / "model.onnx"), None, "onnx", TOKENIZER | {"sentence_bert_config.json": b"{}"})
    assert found == {str(tmp_path / name): data for name, data in TOKENIZER.items()}


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_read_as_they_were_written(saved: Path) -> None:
    info = inspect(saved)
    assert read_preparation(saved, info) == TOKENIZER
    assert info["file_bytes"] == sum((saved / name).stat().st_size for name in FILES)
    mlorq.load(saved, model=Everything())


def test_a_model_without_files_has_no_entry(tmp_path: Path) -> None:
    save(checkpoint_files(compress(Everything(), ALLOCATION), DESCRIPTION), tmp_path)
    assert "preparation" not in json.loads((tmp_path / "mlorq.json").read_text())
    assert read_preparation(tmp_path, inspect(tmp_path)) == {}


def test_overwriting_removes_the_tokenizer_of_the_older_checkpoint(saved: Path) -> None:
    (saved / "preparation" / "notes.txt").write_text("mine")
    with_tokenizer(saved, {"vocab.txt": b"another\n"})
    assert {path.name for path in (saved / "preparation").iterdir()} == {"notes.txt", "vocab.txt"}


def test_changed_and_missing_files_are_named(saved: Path) -> None:
    info = inspect(saved)
    for data in (b"the\nb\n", b"the\na\n\n"):  # of the same size, and of another
        (saved / "preparation" / "vocab.txt").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"preparation/vocab\.txt does not have its size and digest"):
            read_preparation(saved, info)
    (saved / "preparation" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"the folder has no preparation/vocab\.txt"):
        read_preparation(saved, info)
    mlorq.load(saved, model=Everything())  # which does not need them
    shutil.rmtree(saved / "preparation")  # left behind when the model was copied
    assert read_preparation(saved, info) == {}


@pytest.mark.parametrize("name", ["../secret.json", "modeling.py", "/etc/passwd", "config.json", "model.safetensors"])
def test_no_other_file_is_read(saved: Path, name: str) -> None:
    (saved / "preparation" / "secret.json").write_text("{}")
    config = {"preparation": {name: {"bytes": 2, "digest": digest(b"{}")}}}
    with pytest.raises(CheckpointError, match="is not a file of a tokenizer or image processor"):
        read_preparation(saved, config)


@pytest.mark.parametrize(
    "wrong",
    [7, {"bytes": "2", "digest": "0"}, {"bytes": 2}, {"bytes": -1, "digest": "0"}, {"bytes": 2, "digest": None}],
)
def test_malformed_entries_are_refused(saved: Path, wrong: Any) -> None:
    edit(saved, lambda config: config["preparation"].update({"vocab.txt": wrong}))
    message = r"mlorq\.json is damaged: preparation\.vocab\.txt must have bytes and a digest"
    with pytest.raises(CheckpointError, match=message):
        inspect(saved)
