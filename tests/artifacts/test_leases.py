"""Leases: one process computes a step, others wait; nobody waits for the dead; gc and runs keep apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlorq.artifacts import leases
from mlorq.artifacts.leases import FOLDER, Leases, _place, _process, once, running
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.errors import StoreError
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session
from tests.flows.test_cli import main, prints_json, write_project


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def left(store: Store) -> list[str]:
    return sorted(store.files.listing(f"{store.root}/{FOLDER}"))


def lease_of(store: Store, kind: str, name: str, **changes: Any) -> str:
    """Write the lease of another process."""
    path = f"{store.root}/{FOLDER}/{kind}/{name}.json"
    described = {"created": 0.0, "place": "elsewhere", "process": [7, "1"], "what": "a run of another"} | changes
    store.files.write(path, json.dumps(described).encode())
    return path


def dead_process() -> list[Any]:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        described = list(_process(process.pid))
    return described


def at_once(calls: list[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_lease_is_there_while_it_is_held(store: Store) -> None:
    with store.leases.hold("runs", "a run") as name:
        (holder,) = store.leases.holders("runs")
        assert holder.name == name
        assert f"a run (process {os.getpid()} on " in str(holder)
        assert not store.leases.holders("gc")
    assert not left(store)
    assert not [thread for thread in threading.enumerate() if thread.name == "mlorq-leases"]


def test_a_lease_counts_from_the_moment_it_can_be_seen(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    files = store.files
    write = files.write

    def write_and_look(path: str, data: bytes) -> None:
        write(path, data)
        seen.append(len(Leases(files, store.root).holders("runs")))  # as another thread does

    monkeypatch.setattr(files, "write", write_and_look)
    with Leases(files, store.root).hold("runs", "a run"):
        pass
    assert seen == [1]


def test_it_is_renewed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.01)
    with store.leases.hold("runs", "a run"):
        (first,) = store.leases.holders("runs")
        deadline = time.monotonic() + 30
        while store.leases.holders("runs")[0].modified == first.modified:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not left(store)


def test_several_threads_make_it_once(store: Store) -> None:
    made: list[int] = []

    def make() -> int:
        time.sleep(0.2)
        made.append(1)
        return len(made)

    found: list[int] = []
    own = [Leases(store.files, store.root) for _ in range(4)]  # as in processes of their own
    calls = [
        lambda each=each: found.append(once(each, "step/key", "it", lambda: len(made) or None, make)) for each in own
    ]
    at_once(calls)
    assert made == [1]
    assert found == [1] * 4
    assert not left(store)


@pytest.mark.parametrize("name", ["0", "f"])  # before and after the name of the other lease
def test_a_lease_that_is_seen_late_makes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It looked for others before there were any, and its file has the older time: as if renamed after a pause."""
    store = Store(str(tmp_path / "store"))
    made: list[str] = []
    at_work, seen = threading.Event(), threading.Event()

    def make_first() -> str:
        at_work.set()
        assert seen.wait(30)
        time.sleep(0.2)
        made.append("first")
        return "first"

    class Late(Leases):
        looks = 0

        def holders(self, kind: str, own: str | None = None) -> list[Any]:
            self.looks += 1
            if self.looks == 1:
                return []
            seen.set()
            return super().holders(kind, own)

        def _write(self, path: str, data: bytes) -> bool:
            written = super()._write(path, data)
            os.utime(path, (1, 1))
            return written

    def find() -> str | None:
        return made[0] if made else None

    names = iter(["8" * 32, name * 32, "9" * 32])
    named = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=next(names)))
    monkeypatch.setattr(leases, "uuid", named)
    found: list[str] = []

    def second() -> None:
        assert at_work.wait(30)
        late = Late(store.files, store.root)
        found.append(once(late, "step/key", "it", find, lambda: made.append("second") or "second"))

    first = Leases(store.files, store.root)
    at_once([lambda: found.append(once(first, "step/key", "it", find, make_first)), second])
    assert found == ["first", "first"]
    assert made == ["first"]
    assert not left(store)


def test_what_one_fails_to_make_the_next_makes(store: Store) -> None:
    begun = threading.Event()
    made: list[int] = []

    def fail() -> int:
        begun.set()
        time.sleep(0.2)
        raise ValueError("out of memory")

    def first() -> None:
        with pytest.raises(ValueError, match="out of memory"):
            once(Leases(store.files, store.root), "step/key", "it", lambda: None, fail)

    def second() -> None:
        begun.wait(10)
        made.append(once(Leases(store.files, store.root), "step/key", "it", lambda: None, lambda: 1))

    at_once([first, second])
    assert made == [1]


def test_the_dead_hold_nobody_up(store: Store) -> None:
    lease_of(store, "step/key", "dead", place=_place(), process=dead_process())
    lease_of(store, "step/key", "another", place=_place(), process=[os.getpid(), "an earlier start"])
    store.files.write(f"{store.root}/{FOLDER}/step/key/damaged.json", b"{")
    assert not store.leases.holders("step/key")
    assert once(store.leases, "step/key", "it", lambda: None, lambda: 1) == 1
    # Who makes it has removed them, so that those who come later do not read them. The damaged one is nobody's.
    assert [path.rpartition("/")[2] for path in store.files.listing(f"{store.root}/{FOLDER}")] == ["damaged.json"]


def test_leases_of_other_machines_expire(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    path = lease_of(store, "step/key", "far")
    assert [holder.what for holder in store.leases.holders("step/key")] == ["a run of another"]
    old = time.time() - leases.EXPIRY_SECONDS - 1
    os.utime(path, (old, old))
    assert not store.leases.holders("step/key")
    assert once(store.leases, "step/key", "it", lambda: None, lambda: 1) == 1


def test_ages_are_of_the_store_s_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock is an hour behind this machine's: a lease that is renewed there is not old."""
    store = Store(str(tmp_path))
    behind = time.time() - 3600
    for name in ("own", "far"):
        os.utime(lease_of(store, "gc", name), (behind, behind))
    assert [holder.name for holder in store.leases.holders("gc", "own.json")] == ["far.json", "own.json"]
    assert not store.leases.holders("gc")


def test_a_store_that_cannot_be_written_is_used_without(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, data: bytes, *, manifest: bool = False) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(store.files, "write", refuse)
    with running(store.leases, "a run"):
        assert once(store.leases, "step/key", "it", lambda: None, lambda: 3) == 3


# -- runs and gc -------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_configuration_do_each_step_once(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(write_project(tmp_path, rounding={"method": "nearest"}))
    outcomes: list[Any] = []

    def run() -> None:
        session = Session(config, Store(config.resolve(config.store)))
        run_pipeline(session, InProcess(session, record=outcomes.append), config.budgets)

    at_once([run, run])
    computed = [outcome.ref for outcome in outcomes if not outcome.reused]
    assert len(computed) == len(set(computed)) > 10
    assert {outcome.ref for outcome in outcomes} == set(computed)
    assert len(outcomes) == 2 * len(computed)


def test_gc_leaves_a_store_alone_while_a_run_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_project(tmp_path, rounding={"method": "nearest"}))
    loaded = RunConfig.from_yaml(config)
    session = Session(loaded, Store(loaded.resolve(loaded.store)))
    run_pipeline(session, InProcess(session), loaded.budgets)
    (run,) = prints_json(capsys, "runs", config)["runs"]
    files = session.store.files.listing(session.store.root)
    with running(session.store.leases, "a run of net"):
        assert main(["store", "gc", config, "--keep", run["run"]]) == 2
        error = capsys.readouterr().err
        assert "a run of net (process" in error
        assert "try again when it has ended" in error
        assert main(["store", "gc", config, "--keep", run["run"], "--dry-run"]) == 0
    assert session.store.files.listing(session.store.root).keys() == files.keys()
    assert main(["store", "gc", config, "--keep", run["run"]]) == 0
    assert not left(session.store)


def test_a_run_waits_for_gc(store: Store) -> None:
    order = []

    def run() -> None:
        with running(Leases(store.files, store.root), "a run"):
            order.append("run")

    with store.leases.hold("gc", "mlorq store gc"):
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.3)
        order.append("gc")
    thread.join(30)
    assert order == ["gc", "run"]


def test_an_unknown_run_ends_the_lease_of_gc(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(StoreError), store.leases.hold("gc", "mlorq store gc"):
        raise StoreError("no run")
    assert not left(store)


def test_a_lease_that_could_not_be_removed_holds_its_own_process_up_no_longer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run in a notebook that has met a store that was down."""
    with monkeypatch.context() as patch, store.leases.hold("step/key", "it"):
        patch.setattr(store.leases, "_remove", lambda path: None)
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "_remove", lambda self, path: None)
        with Leases(store.files, store.root).hold("step/key", "it"):
            assert len(Leases(store.files, store.root).holders("step/key")) == 1
    assert left(store)
    assert not Leases(store.files, store.root).holders("step/key")
    assert once(Leases(store.files, store.root), "step/key", "it", lambda: None, lambda: 1) == 1
