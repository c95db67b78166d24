"""Every code block of docs/DEVICES.md runs as it stands, in the order of the page, beside a small encoder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mlorq
from flows.cli import main
from mlorq.config.run import RunConfig
from tests import zoo

for package in ("onnx", "onnxruntime", "onnxscript", "compressed_tensors"):
    pytest.importorskip(package, reason="needs the extras onnx and compressed-tensors")

PAGE = Path(__file__).parents[2] / "docs" / "DEVICES.md"
SOURCE = {"source": "table", "path": "pairs.csv", "text": ["first", "second"], "batch_size": 4}
RUN = {
    "model": {"family": "transformers", "name": "encoder/", "task": "sentence-similarity"},
    "data": {"calibration": SOURCE | {"samples": 6}, "evaluation": SOURCE | {"label": "score"}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page starts from: ``encoder/``, ``out/`` and ``uniform/``."""
    zoo.save_text_model(tmp_path / "encoder", "bert")
    pairs = zip(zoo.SENTENCES[::2], zoo.SENTENCES[1::2], strict=True)
    rows = "\n".join(f"{first},{second},{index}" for index, (first, second) in enumerate(pairs))
    (tmp_path / "pairs.csv").write_text(f"first,second,score\n{rows}\n")
    for name, search in (("out", {}), ("uniform", {"forms": ["Q"], "bits": [4]})):
        result = zoo.run(tmp_path, {**RUN, "budget": "6bit", "search": zoo.QUICK | search})
        shutil.copytree(result["checkpoint"].removeprefix("file://"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
def test_the_blocks_of_the_page_run_in_their_order(folder: Path) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    ran: dict[str, int] = {}
    names: dict[str, Any] = {}
    for language, text in blocks:
        ran[language] = ran.get(language, 0) + 1
        if language == "python":
            exec(compile(text, f"{PAGE.name}, block {ran[language]}", "exec"), names)
        elif language == "console":
            for line in text.splitlines():
                program, *argv = shlex.split(line, comments=True)
                assert program == "mlorq", line
                assert main(argv) == 0, line
        else:
            assert language == "yaml", f"a block in {language} cannot be run"
            config = RunConfig.from_mapping(RUN | yaml.safe_load(text), str(folder))
            assert config.target or config.export
    assert ran == {"python": 6, "console": 4, "yaml": 2}
    assert names["embedding"].shape == (1, 32)
    assert names["embedding"] == pytest.approx(_embedding("a dog runs"), abs=0.2), "of the fast graph"
    assert (folder / "half.safetensors").stat().st_size < 0.6 * (folder / "dense.safetensors").stat().st_size


def _embedding(text: str) -> Any:
    from mlorq.models.sentence import SentenceEmbedding

    with torch.no_grad():
        return SentenceEmbedding()(mlorq.load("out/"), zoo.tokenizer()([text], return_tensors="pt")).numpy()


def test_the_readme_links_the_page() -> None:
    assert f"(docs/{PAGE.name})" in (PAGE.parents[1] / "README.md").read_text()
