"""examples/notebook.ipynb runs from its first cell to its last, and what it shows is what such a run gives."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbclient")
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def shown(notebook: Any, start: str) -> dict[str, Any]:
    """The mapping that the cell with this code shows."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and start in cell.source)
    found = ast.literal_eval(cell.outputs[-1]["data"]["text/plain"])
    assert isinstance(found, dict)
    return found


def test_the_notebook_is_stored_with_its_outputs_and_no_place_of_a_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in order"
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    text = NOTEBOOK.read_text()
    assert not any(place in text for place in ("/home/", "/tmp/", "/root/", "/work/"))
    figures = shown(notebook, "result = mlorq.compress(")
    assert figures["compressed"]["accuracy"] > figures["float"]["accuracy"] - 0.02
    assert figures["file_bytes"] < figures["float_bytes"] / 8


@pytest.mark.long
def test_the_notebook_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = shown(notebook, "result = mlorq.compress(")
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = shown(notebook, "result = mlorq.compress(")
    assert found["float"]["accuracy"] == pytest.approx(stored["float"]["accuracy"], abs=0.04)  # trained on this machine
    assert found["compressed"]["accuracy"] > found["float"]["accuracy"] - 0.02
    assert found["file_bytes"] == pytest.approx(stored["file_bytes"], rel=0.02)
    assert (tmp_path / "notebook_out" / "model.onnx").is_file()
