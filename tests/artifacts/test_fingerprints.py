"""Fingerprints of files, folders and software: unchanged content keeps them, every change is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from mlorq.artifacts.fingerprints import (
    SMALL,
    code_of,
    fingerprint,
    fingerprints,
    opened_files,
    paths_in,
    software,
    unchanged,
    user_code,
)


def test_a_small_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"one")
    first = fingerprint(str(path))
    os.utime(path, (1, 1))
    assert fingerprint(str(path)) == first
    path.write_bytes(b"two")
    assert fingerprint(str(path)) != first


def test_a_large_file_counts_by_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(SMALL + 1))
    os.utime(path, ns=(5, 5))
    first = fingerprint(str(path))
    os.utime(path, ns=(5, 6))
    assert fingerprint(str(path)) != first
    path.write_bytes(bytes(SMALL + 2))
    os.utime(path, ns=(5, 5))
    assert fingerprint(str(path)) != first


def test_a_folder_counts_by_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = tmp_path / "data", tmp_path / "data" / "deep" / "store"
    store.mkdir(parents=True)
    (folder / "deep" / "a").write_bytes(b"1")
    (folder / "nothing").symlink_to(tmp_path / "gone")
    seen = {fingerprint(str(folder), str(store))}
    (store / "artifact").write_bytes(b"1")
    assert fingerprint(str(folder), str(store)) in seen
    changes = [
        lambda: os.utime(folder / "deep" / "a", ns=(1, 1)),
        lambda: (folder / "b").write_bytes(b"1"),
        lambda: (folder / "b").rename(folder / "c"),
        lambda: (folder / "deep" / "a").unlink(),
    ]
    other = tmp_path / "other"
    other.mkdir()
    for change in changes:
        change()
        now = fingerprint(str(folder), str(store))
        assert now is not None
        assert now not in seen
        seen.add(now)
    (other / "x").write_bytes(b"1")
    (folder / "linked").symlink_to(other)
    assert fingerprint(str(folder), str(store)) not in seen
    monkeypatch.setattr("mlorq.artifacts.fingerprints.MOST_FILES", 1)
    assert fingerprint(str(folder)) is None
    assert fingerprints([str(folder), str(tmp_path / "gone")]) is None


def test_a_file_that_appears_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    known = fingerprints([str(path)])
    assert known is not None
    assert unchanged(known)
    path.write_bytes(b"1")
    assert not unchanged(known)
    assert str(path) in set(paths_in({"a": [{"weights": path.name}], "b": 1}, str(tmp_path)))
    assert str(path) in set(paths_in([str(path)], "/elsewhere"))


def test_opened_files_are_those_that_this_thread_reads(tmp_path: Path) -> None:
    names = ("text", "array.npy", "written", "gone", "elsewhere", "before")
    paths = {name: tmp_path / name for name in names}
    for name in ("text", "gone", "elsewhere", "before"):
        paths[name].write_text("x")
    np.save(paths["array.npy"], np.zeros(3))
    paths["before"].read_text()
    with opened_files() as outer:
        with opened_files() as found:
            paths["text"].read_text()
            np.load(paths["array.npy"])
            paths["written"].write_text("x")
            paths["gone"].read_text()
            paths["gone"].unlink()
            thread = threading.Thread(target=paths["elsewhere"].read_text)
            thread.start()
            thread.join()
            Path(pytest.__file__).read_text()  # of an installed package
        assert found == {str(paths["text"]), str(paths["array.npy"])}
        paths["before"].read_text()
    assert outer == found | {str(paths["before"])}


def code_in(known: set[str]) -> list[str]:
    found = user_code(known)
    assert found is not None
    return found


def test_user_code_and_the_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("users_module.py", "users_weights.safetensors", "notes.txt"):
        (tmp_path / name).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    __import__("users_module")
    sys.modules.pop("users_module")
    others = {name.partition(".")[0] for name in sys.modules} - {"users_module", "tests"}
    assert str(tmp_path / "users_module.py") not in code_in(others)
    __import__("users_module")
    found = code_in(others | {"tests"})
    (tmp_path / "users_module.py").write_text("changed = True")
    os.utime(tmp_path / "users_module.py", (time.time() + 1,) * 2)
    assert user_code(others) is None
    sys.modules.pop("users_module")
    assert {path for path in found if path.startswith(str(tmp_path))} == {
        str(tmp_path / "users_module.py"),
        str(tmp_path / "users_weights.safetensors"),
    }
    assert not [path for path in found if path.startswith(os.path.dirname(pytest.__file__))]
    assert __file__ not in found
    assert __file__ in code_in(others)


def test_software_and_code_are_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, mlorq.artifacts.fingerprints as f; print(json.dumps([f.software(), f.code_of(['mlorq'])]))\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import json

    assert json.loads(found) == [software(), code_of(["mlorq"])]
    before = software()
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert software() != before


def test_a_changed_source_file_changes_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    (package / "part").mkdir(parents=True)
    for name in ("__init__.py", "part/inner.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("some_package")
    first = code_of(["some_package"])
    (package / "part" / "inner.py").write_text("x = 2\n")
    assert code_of(["some_package"]) != first
    sys.modules.pop("some_package")


def test_modules_may_be_imported_meanwhile() -> None:
    done = threading.Event()

    def importing() -> None:
        count = 0
        while not done.is_set():
            names = [f"imported_meanwhile_{count + index}" for index in range(50)]
            sys.modules.update({name: types.ModuleType(name) for name in names})
            for name in names:
                del sys.modules[name]
            count += 50

    thread = threading.Thread(target=importing)
    thread.start()
    try:
        for _ in range(50):
            user_code(("mlorq", "steps", "flows"))
    finally:
        done.set()
        thread.join()
