"""Runs whose configuration names exports: a sentence encoder with its tokenizer, in this process and in others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import mlorq
from flows.cli import main
from tests import zoo

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

VALUES: dict[str, Any] = {
    "model": {"family": "transformers", "name": "./encoder", "task": "sentence-similarity"},
    "data": {
        "calibration": {"source": "table", "path": "pairs.csv", "text": ["a", "b"], "samples": 6, "batch_size": 4},
        "evaluation": {"source": "table", "path": "pairs.csv", "text": ["a", "b"], "label": "score"},
    },
    "budget": "6bit",
    "preset": "quick",
    "search": zoo.QUICK,
    "rounding": {"method": "nearest"},
    "export": [
        {"to": "onnx", "precision": "fast", "tokenizer": "./encoder"},
        {"to": "transformers", "source": "./encoder", "data": "eight sentences"},
    ],
    "engine": {"devices": "cpu", "threads": 1, "steps": "subprocess"},
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    zoo.save_text_model(tmp_path / "encoder", "bert")
    pairs = zip(zoo.SENTENCES[::2], zoo.SENTENCES[1::2], strict=True)
    rows = "\n".join(f"{a},{b},{index}" for index, (a, b) in enumerate(pairs))
    (tmp_path / "pairs.csv").write_text(f"a,b,score\n{rows}\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALUES))
    return tmp_path / "run.yaml"


def path_of(uri: str) -> str:
    return uri.removeprefix("file://")


@pytest.mark.long
def test_a_flow_ends_in_deployable_files(
    project: Path, capsys: pytest.CaptureFixture[str], prefect_server: str
) -> None:
    """Steps run in child processes, as they do in containers: all that they read is in their specification."""
    assert main(["compress", str(project), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    graph, folder = result["exports"]
    assert {"model.onnx", "tokenizer.json"} <= {file["name"] for file in graph["files"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
        file["name"] for file in folder["files"]
    }
    assert graph["about"]["precision"] == "fast"
    assert graph["bytes"] == sum(file["bytes"] for file in graph["files"])

    batch = zoo.tokenizer()(zoo.SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = mlorq.load(result["checkpoint"])(**batch).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(path_of(folder["uri"]))(**batch).last_hidden_state, expected)
    for exported in (graph, folder):
        found = AutoTokenizer.from_pretrained(path_of(exported["uri"]))(zoo.SENTENCES, padding=True)
        assert found["input_ids"] == batch["input_ids"].tolist()
    file = next(file["uri"] for file in graph["files"] if file["name"] == "model.onnx")
    found = mlorq.load(path_of(file), runtime="onnxruntime")(**batch).last_hidden_state
    masked = batch["attention_mask"].bool()
    assert float((found - expected)[masked].square().sum() / expected[masked].square().sum()) < 0.05

    assert main(["compress", str(project)]) == 0
    out = capsys.readouterr().out
    assert "0 computed" in out
    assert f"export to onnx: {graph['uri']}" in out
    assert main(["report", result["run"], str(project), "--output", str(project.parent / "page.html")]) == 0
    assert "export to onnx" in (project.parent / "page.html").read_text()
