"""Links inside a local store do not lead out of it, and hostile manifests are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlorq.artifacts.gc import folders, removable, remove
from mlorq.artifacts.leases import running
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.errors import StoreError

KEY = "0123456789abcdef" * 2


@pytest.mark.parametrize("linked", ["step", f"step/{KEY}", f"step/{KEY}/a"])
def test_links_out_of_a_store_are_not_followed(tmp_path: Path, linked: str) -> None:
    store, ref = Store(f"file://{tmp_path}/store"), ArtifactRef("step", KEY)
    store.write("step", KEY, {"a": b"1"})
    inside, outside = tmp_path / "store" / linked, tmp_path / "outside"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    with pytest.raises(StoreError, match="leads out of the store"):
        store.read_bytes(ref, "a")
    with pytest.raises(StoreError, match="leads out of the store"):
        store.write("step", KEY, {"a": b"2"})
    before = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    remove(store, removable(folders(store), set()))
    assert before
    assert all(path.read_bytes() == data for path, data in before.items())


def test_the_store_itself_can_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = Store(f"file://{tmp_path}/link")
    assert store.read_bytes(store.write("step", KEY, {"a": b"1"}), "a") == b"1"


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"format": ' + b"9" * 10_000 + b"}", b'"' + b"x" * 10**6 + b'"', b"[]"]
)
def test_hostile_manifests_are_one_line(tmp_path: Path, text: bytes) -> None:
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"a": b"1"})
    (tmp_path / "step" / KEY / "manifest.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"is damaged: manifest\.json") as error:
        store.exists(ref)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("linked", ["leases", "leases/runs"])
def test_leases_do_not_lead_out_of_a_store(tmp_path: Path, linked: str) -> None:
    store, outside, inside = Store(f"file://{tmp_path}/store"), tmp_path / "outside", tmp_path / "store" / linked
    inside.parent.mkdir(parents=True)
    outside.mkdir()
    inside.symlink_to(outside)
    with pytest.raises(StoreError, match="leads out of the store"), running(store.leases, "a run"):
        pass
    with pytest.raises(StoreError, match="leads out of the store"):
        store.leases.holders("runs")
    assert not list(outside.iterdir())


def test_damaged_leases_hold_nobody_up(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    place = '"created": 0, "place": "p", "what": "w"'
    texts = ["[" * 100_000, f'{{{place}, "process": [Infinity, ""]}}', f'{{{place}, "process": 5}}', "x" * 10**6, ""]
    for index, text in enumerate(texts):
        store.files.write(f"{store.root}/leases/runs/{index}.json", text.encode())
    assert store.leases.holders("runs") == []


def test_a_manifest_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"a": b"1"})
    monkeypatch.setattr("mlorq.artifacts.store.MOST_MANIFEST_BYTES", 1000)
    with (tmp_path / "step" / KEY / "manifest.json").open("ab") as file:
        file.write(b" " * 900)
    with pytest.raises(StoreError, match=r"is damaged: manifest\.json: it has more than 1,000 B"):
        store.exists(ref)


def test_a_manifest_that_lists_less_is_damaged(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"a": b"1", "b": b"2"}, details={"layer": "x"})
    path = tmp_path / "step" / KEY / "manifest.json"
    values = json.loads(path.read_text())
    del values["files"]["b"]
    path.write_text(json.dumps(values))
    with pytest.raises(StoreError, match=r"manifest\.json: its digest differs"):
        store.exists(ref)
