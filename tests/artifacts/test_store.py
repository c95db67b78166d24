"""Artifacts: what is written is what is read, and damage is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from mlorq.artifacts.store import ArtifactRef, Store, arrays_bytes, json_bytes, table_bytes, tensors_bytes
from mlorq.errors import StoreError

KEY = "0123456789abcdef" * 2


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    return Store(f"file://{tmp_path}/store" if request.param == "file" else f"memory://{tmp_path.name}")


def test_round_trip_of_every_format(store):
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    tensors = {"t": torch.randn(3, 4), "half": torch.randn(2).half()}
    files = {
        "t.parquet": table_bytes(table),
        "deep/er.safetensors": tensors_bytes(tensors),
        "i.json": json_bytes({"ü": [1, None, 0.1]}),
    }
    ref = store.write("step", KEY, files, details={"layer": "x"}, seconds=1.5)
    assert store.exists(ref)
    assert store.read_table(ref, "t.parquet").equals(table)
    found = store.read_tensors(ref, "deep/er.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert store.read_json(ref, "i.json") == {"ü": [1, None, 0.1]}
    assert store.manifest(ref)["seconds"] == 1.5
    assert list(store.refs("step")) == [ref]


def test_arrays_are_stored_as_tensors_are(store):
    tensors = {
        "matrix": torch.randn(3, 4),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5),
        "half": torch.randn(2).half(),
        "codes": torch.arange(5, dtype=torch.uint8),
        "whole": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    data = tensors_bytes(tensors)
    assert arrays_bytes({name: tensor.numpy() for name, tensor in tensors.items()}) == data
    ref = store.write("step", KEY, {"x.safetensors": data, "y.safetensors": b"?"})
    assert arrays_bytes(store.read_arrays(ref, "x.safetensors")) == data
    with pytest.raises(StoreError, match="damaged: y"):
        store.read_arrays(ref, "y.safetensors")


def test_equal_content_gives_equal_bytes():
    table = pa.table({"a": [0.5, 2.0]})
    assert table_bytes(table) == table_bytes(pa.table({"a": [0.5, 2.0]}))
    tensors = {"b": torch.arange(4), "a": torch.ones(2)}
    assert tensors_bytes(tensors) == tensors_bytes(dict(reversed(tensors.items())))


def test_no_manifest_no_artifact(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    ref = store.write("step", KEY, {"a": b"1"})
    os.unlink(tmp_path / "store" / "step" / KEY / "manifest.json")
    assert not store.exists(ref)
    assert list(store.refs("step")) == []
    with pytest.raises(StoreError, match="not in the store"):
        store.read_bytes(ref, "a")


def test_an_interrupted_write_leaves_no_artifact(tmp_path, monkeypatch):
    store = Store(f"file://{tmp_path}/store")
    real = Store._put

    def dies(self, path, data):
        if path.endswith("b"):
            raise KeyboardInterrupt
        real(self, path, data)

    monkeypatch.setattr(Store, "_put", dies)
    with pytest.raises(KeyboardInterrupt):
        store.write("step", KEY, {"a": b"1", "b": b"2"})
    monkeypatch.undo()
    assert not store.exists(ArtifactRef("step", KEY))
    assert store.exists(store.write("step", KEY, {"a": b"1", "b": b"2"}))
    assert not list(Path(tmp_path).rglob("*.tmp"))


def test_bytes_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    done: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def renamed(source, target):
        done.append(("rename", os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    Store(f"file://{tmp_path}/store").write("step", KEY, {"a": b"0" * 100_000})
    assert done[:2] == [("fsync", 100_000), ("rename", 100_000)]
    assert [what for what, _ in done] == ["fsync", "rename"] * 2  # the manifest's


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble", "manifest"])
def test_damage_is_named_and_harms_nothing_else(tmp_path, damage):
    store = Store(f"file://{tmp_path}/store")
    ref = store.write("step", KEY, {"a.json": b'{"x": 1}'})
    other = store.write("step", KEY[::-1], {"a.json": b"{}"})
    file = tmp_path / "store" / "step" / KEY / "a.json"
    if damage == "truncate":
        file.write_bytes(b"{")
    elif damage == "remove":
        file.unlink()
    elif damage == "garble":
        file.write_bytes(b'{"x": 2}')
    else:
        (file.parent / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=KEY) as caught:
        store.exists(ref) if damage != "garble" else store.read_bytes(ref, "a.json")
    assert "\n" not in str(caught.value)
    if damage != "garble":
        with pytest.raises(StoreError, match=r"a\.json|manifest\.json"):
            store.read_json(ref, "a.json")
    assert store.read_json(other, "a.json") == {}


def test_reading_what_an_artifact_does_not_hold(store):
    ref = store.write("step", KEY, {"a.bin": b"no table"})
    with pytest.raises(StoreError, match="no file 'b'"):
        store.read_bytes(ref, "b")
    for read in (store.read_table, store.read_tensors, store.read_json):
        with pytest.raises(StoreError, match="damaged"):
            read(ref, "a.bin")


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_flipped_bit_is_found_on_every_read(tmp_path, place):
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"codes": bytes(range(256))})
    file = tmp_path / "step" / KEY / "codes"
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    assert store.exists(ref)
    with pytest.raises(StoreError, match=f"{KEY} is damaged: codes"):
        Store(f"file://{tmp_path}").read_bytes(ref, "codes")


@pytest.mark.parametrize("moved", [("step", "1" * 32), ("other", KEY)])
def test_a_folder_that_was_renamed_is_not_another_artifact(tmp_path, moved):
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"a.json": b"1"})
    (tmp_path / moved[0]).mkdir(exist_ok=True)
    (tmp_path / "step" / KEY).rename(tmp_path / moved[0] / moved[1])
    for read in (store.exists, store.manifest, lambda ref: store.read_json(ref, "a.json")):
        with pytest.raises(StoreError, match=f"it is that of artifact step/{KEY}"):
            read(ArtifactRef(*moved))
    assert not store.exists(ref)


OUTSIDE = ["../x", "a/../../x", "/etc/hostname", "", ".", "a//b", "a/", "..", "x\0y"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_of_files_stay_inside_their_artifact(tmp_path, name):
    store = Store(f"file://{tmp_path}/store")
    with pytest.raises(StoreError, match="is not a name inside"):
        store.write("step", KEY, {name: b"1"})
    assert not list(tmp_path.rglob("*"))
    ref = store.write("step", KEY, {"sub/a": b"1"})
    assert store.read_bytes(ref, "sub/a") == b"1"
    manifest = tmp_path / "store" / "step" / KEY / "manifest.json"
    values = json.loads(manifest.read_text())
    values["files"][name] = values["files"].pop("sub/a")
    manifest.write_text(json.dumps(values))
    for read in (store.exists, lambda ref: store.read_bytes(ref, name)):
        with pytest.raises(StoreError, match="is not a name inside"):
            read(ref)


@pytest.mark.parametrize("name", [*OUTSIDE, "a/b"])
def test_steps_and_keys_are_single_names(tmp_path, name):
    store = Store(f"file://{tmp_path}/store")
    for step, key in ((name, KEY), ("step", name)):
        with pytest.raises(StoreError, match="is not"):
            store.write(step, key, {"a": b"1"})
        with pytest.raises(StoreError, match="is not"):
            store.exists(ArtifactRef(step, key))
    assert not list(tmp_path.rglob("*"))


def test_two_writers_of_one_key_are_harmless(tmp_path):
    first, second = Store(f"file://{tmp_path}"), Store(f"file://{tmp_path}")
    ref = first.write("step", KEY, {"a": b"same"})
    assert second.write("step", KEY, {"a": b"same"}) == ref
    assert first.read_bytes(ref, "a") == b"same"


def test_a_store_that_cannot_be_written_is_found_first(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(f"file://{tmp_path}/file/store").check_writable()
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://bucket/x")
    good = Store(f"file://{tmp_path}/good")
    good.check_writable()
    assert os.listdir(tmp_path / "good") == []


def test_manifest_lists_sizes_and_digests(tmp_path):
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"a": b"12345"})
    manifest = json.loads((tmp_path / "step" / KEY / "manifest.json").read_text())
    assert manifest["files"]["a"]["bytes"] == 5
    assert len(manifest["files"]["a"]["digest"]) == 32
    assert store.uri(ref, "a") == f"file://{tmp_path}/step/{KEY}/a"


def test_errors_of_a_store_show_no_password():
    with pytest.raises(StoreError, match=r"nosuch://me:\*\*\*@host/x") as caught:
        Store("nosuch://me:hunter2@host/x")
    assert "hunter2" not in str(caught.value)
