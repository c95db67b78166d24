"""Temporary folders: those of killed processes are removed, those in use by anybody are not."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import mlorq
from mlorq import scratch
from mlorq.errors import MlorqError
from mlorq.scratch import scratch_folder
from steps import api

HOLDER = """
import os, sys
from mlorq.scratch import scratch_folder
with scratch_folder() as folder:
    os.makedirs(f"{folder}/preparation")
    open(f"{folder}/preparation/vocab.txt", "w").close()
    print(folder, flush=True)
    sys.stdin.read()
"""
MANY = """
import os
from mlorq.scratch import scratch_folder
for turn in range(60):
    with scratch_folder() as folder:
        open(f"{folder}/file", "w").close()
        os.listdir(os.path.dirname(folder))
        assert os.path.exists(f"{folder}/file"), "removed while in use"
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def process(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_not(parent: Path) -> None:
    killed, living = process(HOLDER), process(HOLDER)
    assert killed.stdout is not None
    assert living.stdout is not None
    folders = [Path(one.stdout.readline().strip()) for one in (killed, living)]  # type: ignore[union-attr]
    with scratch_folder():
        assert all((folder / "preparation" / "vocab.txt").exists() for folder in folders)
    killed.kill()
    killed.communicate()
    assert folders[0].exists()
    with scratch_folder() as own:
        assert set(parent.iterdir()) == {folders[1], Path(own)}
    assert living.communicate()[1] == ""
    assert living.returncode == 0
    assert list(parent.iterdir()) == []


def test_processes_and_threads_that_make_folders_at_the_same_time_leave_those_of_others(parent: Path) -> None:
    processes = [process(MANY) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(exec, MANY, {}) for _ in range(4)]:
            done.result()
    assert [one.communicate()[1] for one in processes] == [""] * 4
    assert list(parent.iterdir()) == []


def test_a_folder_that_is_taken_for_left_over_before_it_is_locked_is_made_again(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not taken:
            (folder,) = parent.iterdir()
            taken.append(folder)
            folder.rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder() as folder:
        assert [Path(folder)] == list(parent.iterdir()) != taken


def test_folders_of_other_machines_users_and_programs_are_left(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "BOOT", parent / "none")  # a machine with the node's name
        patch.setattr("platform.node", lambda: "elsewhere")
        with scratch_folder() as elsewhere:
            os.makedirs(f"{elsewhere}-left")
    (parent / "mlorq-checkpoint-old").mkdir()
    own = parent / f"{scratch._prefix()}link"
    own.symlink_to(parent / "mlorq-checkpoint-old")
    kept = set(parent.iterdir())
    with scratch_folder():
        pass
    assert set(parent.iterdir()) == kept
    own.unlink()
    own.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with scratch_folder():
            assert own.exists()
    with scratch_folder():
        assert not own.exists()


def test_a_file_system_without_locks(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with scratch_folder() as first, scratch_folder() as second:
        assert {Path(first), Path(second)} == set(parent.iterdir())
    assert list(parent.iterdir()) == []


def test_a_folder_is_its_user_s_alone(parent: Path) -> None:
    with scratch_folder() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_no_place_for_a_folder_is_one_line(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(parent / "none"))
    with pytest.raises(MlorqError, match=r"no temporary folder can be made: .*none.*; set TMPDIR"), scratch_folder():
        pass


def test_a_large_model_s_store_is_such_a_folder(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    monkeypatch.setattr(api, "ARTIFACTS", 2**60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def look(label: str, done: int, total: int) -> None:
        seen.update(path.name for path in parent.iterdir())

    result = mlorq.compress(
        model, [torch.randn(8, 8)], budget="8bit", preset="quick", rounding="nearest", progress=look
    )
    assert result.metrics["steps"]["computed"] > 0
    (name,) = {name for name in seen if name.startswith("mlorq")}
    assert name.startswith(scratch._prefix())
    assert not [path for path in parent.iterdir() if path.name.startswith("mlorq")]
