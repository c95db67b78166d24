"""The rest of a folder of target ``transformers``: model card, tokenizer, sentence modules, upload."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mlorq
from mlorq.checkpoint.io import inspect
from mlorq.errors import CheckpointError, ConfigError
from mlorq.models.sentence import SentenceEmbedding
from mlorq.models.transformers import TransformersSettings, tokenizer
from mlorq.numbers import byte_count
from tests import zoo
from tests.export_targets.models import CASES
from tests.hub import hub_server
from tests.models.test_sentence_encoders import lay_out

POOLING = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
CARD = "---\nlicense: mit\nlanguage: en\ndatasets: [training]\n---\n# The float model\n"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A sentence encoder's folder, and the result of a run that compressed it."""
    folder = tmp_path_factory.mktemp("encoder")
    zoo.save_text_model(folder / "plain", "bert", seed=1)
    source = lay_out(folder / "plain", folder / "my-encoder", ["Transformer", "Pooling"], POOLING)
    (source / "README.md").write_text(CARD)
    pairs = zip(zoo.SENTENCES, zoo.SENTENCES[::-1], strict=True)
    (folder / "pairs.csv").write_text("".join(f"{a},{b},{index % 3}\n" for index, (a, b) in enumerate(pairs)))
    data = {"source": "table", "path": "pairs.csv", "text": [0, 1], "label": 2, "batch_size": 4}
    model = {"family": "transformers", "name": str(source), "task": "sentence-similarity"}
    values = {"model": model, "data": {"calibration": data, "evaluation": data | {"metric": "spearman"}}}
    return source, zoo.run(folder, values)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return CASES["bert"].compressed(tmp_path_factory.mktemp("bert") / "checkpoint")


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of the tables of a text, by the first line of each."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found[" ".join(head).strip()] = rows
    return found


# -- sentence encoders -------------------------------------------------------------------------------------------------


def test_sentence_transformers_loads_the_folder_with_its_pooling(encoder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    source, result = encoder
    mlorq.export(result["checkpoint"], tmp_path / "out", to="transformers", source=str(source))
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found = model.encode(zoo.SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    tokens = tokenizer(TransformersSettings(name=str(source)))
    with torch.no_grad():
        wanted = SentenceEmbedding(("cls", "mean"), normalised=False)(
            mlorq.load(result["checkpoint"]), dict(tokens(zoo.SENTENCES, padding=True, return_tensors="pt"))
        )
    assert found.shape == (len(zoo.SENTENCES), 64)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_the_tokenizer_is_copied_and_missing_ones_are_mentioned(encoder, bert, tmp_path):
    source, result = encoder
    mlorq.export(result["checkpoint"], tmp_path / "with", to="transformers", source=str(source))
    mlorq.export(bert, tmp_path / "without", to="transformers")
    assert (tmp_path / "with/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (tmp_path / "without/tokenizer.json").exists()
    assert "The folder has no tokenizer" not in card_of(tmp_path / "with")[1]
    assert "The folder has no tokenizer" in card_of(tmp_path / "without")[1]


def test_dense_layers_after_the_pooling_are_refused(encoder, tmp_path):
    from tests.models.test_sentence_encoders import DENSE, with_dense

    source, _ = encoder
    folder = with_dense(source.parent / "plain", tmp_path / "encoder", DENSE)
    pairs = str(source.parent / "pairs.csv")
    data = {"source": "table", "path": pairs, "text": [0, 1], "label": 2, "batch_size": 4, "metric": "spearman"}
    model = {"family": "transformers", "name": str(folder), "task": "sentence-similarity"}
    result = zoo.run(tmp_path, {"model": model, "data": {"calibration": data, "evaluation": data}})
    with pytest.raises(CheckpointError, match="has dense layers after its pooling"):
        mlorq.export(result["checkpoint"], tmp_path / "out", to="transformers")


# -- model card --------------------------------------------------------------------------------------------------------


def test_the_card_has_the_numbers_of_the_checkpoint_and_of_the_run(encoder, tmp_path):
    source, result = encoder
    mlorq.export(result["checkpoint"], tmp_path / "out", to="transformers", source=str(source), data="Eight pairs.")
    front, text = card_of(tmp_path / "out")
    assert front == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "license": "mit",
        "language": "en",
        "tags": ["mlorq", "quantized", "mixed-precision"],
    }
    info, found = inspect(result["checkpoint"]), tables(text)
    assert text.startswith("\n# my-encoder, compressed to 5bit with mlorq\n")
    assert f"{byte_count(info['budget']['budget_bytes'])}" in text
    sizes = {row[0]: row[1] for row in found["bytes in float32"]}
    assert sizes["compressed layers"] == f"{info['sizes']['bytes']:,}"
    written = sum((tmp_path / "out" / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert sizes["`model.safetensors` and `config.json`"] == f"{written:,}"
    measured = result["metrics"]["compressed"]["spearman"]
    assert found["metric float model this model"] == [
        ["spearman", f"{result['metrics']['float']['spearman']:.4f}", f"{measured:.4f}"]
    ]
    assert f"{result['nmse']:.6f}" in text
    layers = {row[0].strip("`"): (row[2], row[3]) for row in found["layer shape form bytes"]}
    assert layers == {row["layer"]: (row["candidate_id"], f"{row['bytes']:,}") for row in result["allocation"]}
    groups = found["name form layers weights bytes"]
    assert sum(int(row[4].replace(",", "")) for row in groups) == info["sizes"]["bytes"]
    assert f"Eight pairs. The hash of the samples is `{info['hashes']['calibration']}`." in text


def test_the_card_leaves_out_what_is_not_known(bert, tmp_path):
    mlorq.export(bert, tmp_path / "out", to="transformers")
    front, text = card_of(tmp_path / "out")
    assert set(front) == {"library_name", "tags"}
    assert "## Metrics" not in text
    assert text.startswith("\n# BertModel, compressed to 5bit")
    assert "from transformers import AutoModel\n" in text


def test_the_card_names_the_class_and_the_quantized_activations(tmp_path):
    checkpoint = CASES["quantized activations, adalog, timm"].compressed(tmp_path / "checkpoint")
    mlorq.export(checkpoint, tmp_path / "out", to="transformers")
    front, text = card_of(tmp_path / "out")
    assert front["pipeline_tag"] == "image-classification"
    assert "from transformers import AutoModelForImageClassification\n" in text
    assert re.search(r"\d+ activations are quantized, to [\d, ]*6[\d, ]* bits", text)
    assert "The folder has no" not in text


def test_the_result_of_a_run_can_be_given_and_must_be_the_checkpoint_s(encoder, bert, tmp_path):
    result = deepcopy(encoder[1])
    (tmp_path / "result.json").write_text(json.dumps({"results": [result]}))
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in Path(result["checkpoint"].removeprefix("file://")).iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    mlorq.export(copy, tmp_path / "out", to="transformers", result=str(tmp_path / "result.json"))
    assert "spearman" in card_of(tmp_path / "out")[1]
    result["allocation"][0]["bytes"] += 1
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="has no result with the checkpoint's allocation"):
        mlorq.export(copy, tmp_path / "other", to="transformers", result=str(tmp_path / "result.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        mlorq.export(bert, tmp_path / "other", to="transformers", result=str(tmp_path / "none.json"))


# -- upload ------------------------------------------------------------------------------------------------------------


def export_and_push(checkpoint: Path, output: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: the client of the hub reads its endpoint when it is imported."""
    command = [sys.executable, "-m", "flows.cli", "export", str(checkpoint), "--to", "transformers"]
    command += ["--output", str(output), "--option", "push_to_hub=me/model"]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_folder_is_uploaded_in_one_commit(bert, tmp_path):
    with hub_server() as hub:
        done = export_and_push(bert, tmp_path / "out", hub.url)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{hub.url}/me/model"
        (created,) = hub.created
        assert created.get("visibility") == "private" or created.get("private") is True
        assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_refused_upload_is_reported_in_one_line_and_the_folder_remains(bert, tmp_path):
    with hub_server() as hub:
        hub.refuses = True
        done = export_and_push(bert, tmp_path / "out", hub.url)
    assert done.returncode == 2
    assert re.search(r"push_to_hub me/model: .*403", done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "out/model.safetensors").exists()
