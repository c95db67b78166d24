"""Every write and every request of a run fails once: one line, and the run that follows has the equal result."""

from __future__ import annotations

import builtins
import errno
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mlorq.artifacts import leases, transfer
from mlorq.artifacts.gc import folders, removable, verify
from mlorq.artifacts.hashing import digest_bytes
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.errors import StoreError
from steps.base import Outcome
from steps.faults import is_transient
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session
from tests.flows.test_cli import write_project
from tests.long import few


class Runs:
    """Runs of one configuration whose model and data are loaded once, in any store."""

    def __init__(self, folder: Path) -> None:
        self.config = RunConfig.from_yaml(write_project(folder, rounding={"method": "nearest"}))
        self.loaded = Session(self.config, Store(f"memory://{uuid.uuid4().hex}"))
        self.result, outcomes = self.run(self.loaded.store)
        self.contents = contents(self.loaded.store)
        self.steps = len(outcomes)

    def run(
        self, store: Store, record: Callable[[Outcome], object] = lambda outcome: None
    ) -> tuple[Any, list[Outcome]]:
        loaded, outcomes = self.loaded, list[Outcome]()

        def note(outcome: Outcome) -> None:
            outcomes.append(outcome)
            record(outcome)

        session = Session(
            self.config, store, model=loaded.model, calibration=loaded.calibration, evaluation=loaded.evaluation
        )
        store.check_writable()
        (result,) = run_pipeline(session, InProcess(session, record=note), self.config.budgets)
        return result_json(session, result), outcomes

    def check(self, url: str) -> None:
        """A run in a store completes and has the equal result, files and no damage."""
        result, _ = self.run(Store(url))
        assert found_in(result) == found_in(self.result)
        store = Store(url)
        assert contents(store) == self.contents
        assert verify(store).damaged == []


def found_in(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what differs from run to run and from store to store."""
    same = {
        name: value
        for name, value in result.items()
        if name not in ("seconds", "seconds_reused", "solver", "checkpoint")
    }
    return same | {"objective": result["solver"]["objective"]}


def contents(store: Store) -> dict[str, str]:
    found = {}
    for folder in folders(store):
        for name in folder.files:
            if folder.is_artifact and folder.ref.step != "search" and name != "manifest.json":
                found[f"{folder.ref.step}/{folder.ref.key}/{name}"] = digest_bytes(
                    store.files.read(store.path(folder.ref, name))
                )
    return found


def fault_of(call: Callable[[], object]) -> StoreError | None:
    """The error that a call raises."""
    try:
        call()
    except StoreError as error:
        return error
    return None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


# -- a full disk --------------------------------------------------------------------------------------------------


class Disk:
    """The system's functions as ``mlorq.artifacts.transfer`` calls them; the n-th write of an artifact's file fails.

    Attributes:
        fails_at: number of the write that fails.
        writes, manifests: what was written since.
    """

    def __init__(self, how: str, error: int) -> None:
        self.how, self.error = how, error
        self.fails_at: int | None = None
        self.writes = self.manifests = 0

    def _full(self, path: str) -> OSError:
        return OSError(self.error, os.strerror(self.error), path)

    def open(self, path: str, mode: str = "r", *rest: Any) -> Any:
        if "/leases/" in path or mode != "wb":
            return builtins.open(path, mode, *rest)
        self.writes += 1
        fails = self.writes == self.fails_at
        if fails and self.how == "open":
            raise self._full(path)
        file = builtins.open(path, mode, *rest)  # noqa: SIM115
        if fails and self.how == "write":
            whole = file.write

            def half(data: bytes) -> int:
                whole(data[: len(data) // 2])
                raise self._full(path)

            return _Replaced(file, half)
        return file

    def fsync(self, descriptor: int) -> None:
        if self.writes == self.fails_at and self.how == "fsync" and "/leases/" not in _path(descriptor):
            raise self._full(_path(descriptor))
        os.fsync(descriptor)

    def replace(self, source: str, target: str) -> None:
        if "/leases/" not in target:
            if self.writes == self.fails_at and self.how == "rename":
                raise self._full(target)
            self.manifests += target.endswith("manifest.json") and "/search/" not in target
        os.replace(source, target)


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


class _Replaced:
    """A file with another ``write``."""

    def __init__(self, file: io.BufferedWriter, write: Callable[[bytes], int]) -> None:
        self._file, self.write = file, write

    def __enter__(self) -> _Replaced:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@pytest.fixture
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(*request.param)
    functions = {name: getattr(os, name) for name in dir(os) if not name.startswith("__")}
    monkeypatch.setattr(transfer, "open", made.open, raising=False)
    monkeypatch.setattr(transfer, "os", SimpleNamespace(**{**functions, "replace": made.replace, "fsync": made.fsync}))
    return made


FAULTS = [
    (how, error) for how in ("open", "write", "fsync", "rename") for error in (errno.ENOSPC, errno.EFBIG, errno.EIO)
]


@pytest.mark.parametrize(
    "disk",
    few(FAULTS, ("write", errno.ENOSPC)),
    indirect=True,
    ids=lambda fault: f"{fault[0]}-{errno.errorcode[fault[1]]}",
)
def test_the_disk_is_full_at_every_write(disk: Disk, runs: Runs, tmp_path: Path) -> None:
    """A run after another in one store, each stopped at the write after those that the earlier ones had reached."""
    url = f"file://{tmp_path}/store"
    fails_at, failed = 1, 0
    while True:
        before = len(list(Path(f"{tmp_path}/store").rglob("manifest.json")))
        disk.fails_at, disk.writes, disk.manifests = fails_at, 0, 0
        fault = fault_of(lambda: runs.run(Store(url)))
        if fault is not None:
            failed += 1
            assert "cannot write artifact" in str(fault)
            assert os.strerror(disk.error) in str(fault)
            assert "\n" not in str(fault)
            assert is_transient(fault) is (disk.error == errno.EIO)
            assert verify(Store(url)).damaged == []
            assert not list(tmp_path.rglob("*.tmp"))  # what was written of the file is gone
            # What fails next: the following write of the same artifact, or the second one of the next.
            fails_at = 2 if disk.manifests else fails_at + 1
        elif disk.writes >= fails_at:
            fails_at += 1  # it was the index of the search, without which the run goes on
        else:
            break
        assert len(list(Path(f"{tmp_path}/store").rglob("manifest.json"))) >= before
    assert failed > 2 * runs.steps  # at least a file and a manifest of each
    disk.fails_at = None
    runs.check(url)


# -- a store that cannot be reached -------------------------------------------------------------------------------


class Flaky(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store in memory, behind a network that breaks down when ``fault`` says so."""

    protocol = "flaky"
    cachable = False
    memory = MemoryFileSystem()
    requests = 0
    fault: Callable[[str, int], bool] = staticmethod(lambda request, number: False)


def _requesting(name: str) -> Callable[..., Any]:
    def request(self: Flaky, path: str, *rest: Any, **options: Any) -> Any:
        Flaky.requests += 1
        if Flaky.fault(f"{name} {path}", Flaky.requests):
            raise ConnectionError(errno.ECONNRESET, "Connection reset by peer")
        found = getattr(Flaky.memory, name)(f"/{path.lstrip('/')}", *rest, **options)
        if name == "find":
            found = {path.lstrip("/"): about for path, about in found.items()}
        return found

    return request


for _name in ("cat_file", "pipe_file", "find", "rm_file", "rm", "ls", "exists", "info", "makedirs"):
    setattr(Flaky, _name, _requesting(_name))
fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    """The class, with its faults switched off, and without pauses between retries."""
    monkeypatch.setattr(transfer, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))
    monkeypatch.setattr(Flaky, "requests", 0)
    yield Flaky
    Flaky.fault = staticmethod(lambda request, number: False)


def flaky_store(url: str, patience: float) -> Store:
    store = Store(url)
    store.files.patience = patience
    store.leases._files.patience = patience
    return store


def test_every_request_fails_at_first(flaky: type[Flaky], runs: Runs) -> None:
    url = f"flaky://{uuid.uuid4().hex}"
    store = flaky_store(url, 30.0)
    store.check_writable()
    asked: list[str] = []

    def first_time(request: str, number: int) -> bool:
        asked.append(request)
        return asked.count(request) % 2 == 1

    flaky.fault = staticmethod(first_time)
    result, outcomes = runs.run(store)
    flaky.fault = staticmethod(lambda request, number: False)
    assert len(asked) > 4 * len(outcomes)
    assert found_in(result) == found_in(runs.result)
    runs.check(url)


def test_the_store_is_gone_from_a_request_on(flaky: type[Flaky], runs: Runs) -> None:
    """One run after another in one store; each gets a request further than the one before."""
    url = f"flaky://{uuid.uuid4().hex}"
    failed, until = 0, 2
    while True:
        Flaky.requests = 0
        flaky.fault = staticmethod(lambda request, number, until=until: number > until)
        store = flaky_store(url, 0.0)
        fault = fault_of(lambda store=store: runs.run(store))
        flaky.fault = staticmethod(lambda request, number: False)
        if fault is None:
            break
        failed += 1
        assert "Connection reset by peer" in str(fault)
        assert "\n" not in str(fault)
        assert is_transient(fault)
        assert verify(Store(url)).damaged == []
        until += 1
    assert failed > 50
    runs.check(url)


# -- the clock ----------------------------------------------------------------------------------------------------


def test_the_clock_goes_back_a_day_in_the_middle(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processes, and of the store: files written later are a day older."""
    url = f"file://{tmp_path}/store"
    shift = [0.0]
    clock = time.time
    monkeypatch.setattr(leases, "time", SimpleNamespace(**{**vars(time), "time": lambda: clock() + shift[0]}))
    replace_file = transfer.replace_file

    def write(path: str, data: bytes) -> None:
        replace_file(path, data)
        os.utime(path, (clock() + shift[0],) * 2)

    monkeypatch.setattr(transfer, "replace_file", write)

    def back(outcome: Outcome) -> None:
        shift[0] = -86400.0 if shift[0] == 0.0 else 0.0  # back, and forth again

    result, outcomes = runs.run(Store(url), back)
    assert found_in(result) == found_in(runs.result)
    assert len({outcome.ref for outcome in outcomes}) == len(outcomes) == runs.steps
    runs.check(url)
    # What is as old as the files from before the jump is not taken for an old left-over.
    kept = {outcome.ref for outcome in outcomes}
    gone = removable(folders(Store(url)), kept)
    assert [folder.ref.step for folder in gone] in ([], ["search"])


def test_a_lease_of_tomorrow_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was written on another machine before the store's clock went back; its holder is dead."""
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 0.3)
    monkeypatch.setattr(leases, "PAUSE_SECONDS", 0.02)
    store = Store(f"file://{tmp_path}")
    name = f"{uuid.uuid4().hex}.json"
    path = f"{store.root}/leases/step/key/{name}"
    store.files.write(path, b'{"created": 0, "place": "elsewhere", "process": [7, "1"], "what": "a step"}')
    os.utime(path, (time.time() + 86400,) * 2)
    assert [holder.name for holder in store.leases.holders("step/key")] == [name]  # gc leaves the store alone
    assert leases.once(store.leases, "step/key", "it", lambda: None, lambda: 3) == 3


def test_a_lease_of_tomorrow_that_is_renewed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 0.3)
    store = Store(f"file://{tmp_path}")
    path = f"{store.root}/leases/runs/{uuid.uuid4().hex}.json"
    store.files.write(path, b'{"created": 0, "place": "elsewhere", "process": [7, "1"], "what": "a run"}')
    for turn in range(5):
        os.utime(path, (time.time() + 86400 + turn,) * 2)
        assert len(store.leases.holders("runs")) == 1
        time.sleep(0.15)
