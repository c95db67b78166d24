"""Stores and checkpoints that earlier versions wrote (tests/golden) are read; those of later ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mlorq
from mlorq.artifacts.gc import verify
from mlorq.artifacts.store import Store
from mlorq.checkpoint.io import inspect
from mlorq.errors import CheckpointError, StoreError
from steps.artifacts import ArtifactReader
from tests.golden.make import batches, net

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = {"format_1": (1, 1), "format_2_first": (2, 1), "format_2": (2, 2), "format_3": (3, 2)}


def test_every_folder_is_tested() -> None:
    assert set(FOLDERS) == {path.name for path in GOLDEN.iterdir() if (path / "checkpoint").is_dir()}


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints_compute_what_they_did(name: str) -> None:
    folder = GOLDEN / name
    wanted = safetensors.torch.load_file(folder / "outputs.safetensors")["outputs"]
    loaded = mlorq.load(str(folder / "checkpoint"), model=net(gelu=name == "format_3"))
    with torch.no_grad():
        found = loaded(batches(1, start=0.5)[0])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert inspect(folder / "checkpoint")["format_version"] == FOLDERS[name][0]


@pytest.mark.parametrize("name", FOLDERS)
def test_artifacts_are_read(name: str) -> None:
    store = Store(f"file://{GOLDEN / name / 'store'}")
    found = verify(store)
    assert found.damaged == []
    assert found.artifacts >= 12
    reader = ArtifactReader(store)
    (layers,) = store.refs("layers")
    assert [layer.name for layer in reader.layers(layers).layers] == ["0", "2"]
    (capture,) = store.refs("capture")
    assert reader.moments(capture, "0")["hessian"].shape == (16, 8)
    (allocation,) = store.refs("allocate")
    assert reader.table(allocation, "allocation.parquet").num_rows == 2
    assert {reader.rounded(ref).layers[0].layer for ref in store.refs("round")} == {"0", "2"}
    (compressed,) = store.refs("compressed")
    assert isinstance(mlorq.load(store.uri(compressed), model=net(gelu=name == "format_3")), torch.nn.Module)
    manifest = json.loads((Path(store.path(layers)) / "manifest.json").read_text())
    assert manifest["format"] == FOLDERS[name][1]


def test_later_formats_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(GOLDEN / "format_2", folder)
    store = Store(f"file://{folder / 'store'}")
    (ref,) = store.refs("layers")
    for path, old, new in (
        (Path(store.path(ref)) / "manifest.json", '"format": 2', '"format": 3'),
        (folder / "checkpoint" / "mlorq.json", '"format_version": 2', '"format_version": 3'),
    ):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(StoreError, match="unknown manifest format 3"):
        store.exists(ref)
    with pytest.raises(CheckpointError, match=r"format.*3"):
        mlorq.load(str(folder / "checkpoint"), model=net())
