"""Names of models from transformers: of a folder, or of the hub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlorq.errors import ConfigError, ModelError
from mlorq.export_targets.graph_files import files_beside
from mlorq.export_targets.source_files import prepared_files
from mlorq.models.hub_names import is_hub_name, load_problem
from mlorq.models.transformers import TransformersSettings, locate


def located(name: str, folder: str = "") -> str:
    return locate(TransformersSettings(name=name), folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models" / "bert").mkdir(parents=True)
    (tmp_path / "models" / "weights.bin").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "openai/whisper.en", "models/gpt2", "timm/vit_tiny"])
def test_names_of_the_hub_stay_whatever_folders_are_here(name: str, here: Path) -> None:
    assert is_hub_name(name)
    assert located(name) == name


@pytest.mark.parametrize("name", ["encoder/", "./encoder", "../encoder", "models/bert/encoder", "a b", "models/gpt2/"])
def test_names_of_folders_alone_are_folders(name: str, here: Path) -> None:
    assert not is_hub_name(name)
    with pytest.raises(ModelError) as error:
        located(name)
    assert str(error.value) == f"model.name: folder {os.path.normpath(here / name)} does not exist"


def test_a_folder_that_is_here_is_taken(here: Path) -> None:
    assert located("models/bert") == located("models/bert/") == located("bert/", str(here / "models"))
    assert located("models/bert") == str(here / "models" / "bert")
    with pytest.raises(ModelError, match=r"^model\.name: .*weights\.bin is a file: give the folder"):
        located("models/weights.bin")
    with pytest.raises(ModelError, match=r"^model\.name: folder s3://bucket/encoder is not on this machine"):
        located("encoder/", "s3://bucket")


def test_options_of_exports_are_named(here: Path) -> None:
    with pytest.raises(ConfigError) as tokenizer:
        files_beside("out/model.onnx", "encoder/", "onnx", {})
    assert str(tokenizer.value) == f"export to onnx: option tokenizer: folder {here}/encoder does not exist"
    with pytest.raises(ModelError) as source:
        prepared_files("encoder/", {"family": "transformers"})
    assert str(source.value) == f"option source: folder {here}/encoder does not exist"


def test_an_error_of_the_hub_says_that_there_is_no_folder_either() -> None:
    refused = OSError("cannot connect")
    assert load_problem(refused, "models/gpt2") == (
        "there is no folder 'models/gpt2' here, and from the hub: cannot connect"
    )
    assert load_problem(refused, "/models/gpt2") == "cannot connect"
    assert load_problem(ValueError("unknown type"), "models/gpt2") == "unknown type"
