"""Everything on ``s3://``, against a real S3 server on loopback: same keys, same bytes, and what moves when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlorq.artifacts import transfer as files
from mlorq.artifacts.gc import folders, remove, verify
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.artifacts.transfer import CHUNK_BYTES
from mlorq.config.run import RunConfig
from mlorq.errors import StoreError
from steps.base import Outcome
from steps.faults import is_transient, with_retries
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store
from tests.flows.test_cli import prints_json, write_project
from tests.long import few
from tests.s3 import KEY as USER
from tests.s3 import SECRET, S3Server, changed_environment, s3_server

pytest.importorskip("s3fs")

KEY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: S3Server) -> str:
    return server.new_bucket()


def contents(store: Store) -> dict[str, bytes]:
    """Every file of a store but the manifests, which hold times, and the indices of searches, which hold paths."""
    found = {}
    for folder in (folder for folder in folders(store) if folder.ref.step != "search"):
        for name in folder.files:
            if name != "manifest.json":
                found[f"{folder.ref.step}/{folder.ref.key}/{name}"] = store.read_bytes(folder.ref, name)
    return found


# -- one artifact -------------------------------------------------------------------------------------------------


def test_round_trip_with_large_and_empty_files(url: str) -> None:
    data = {"small": b"1", "empty": b"", "deep/er": b"22", "large": os.urandom(3 * CHUNK_BYTES + 17)}
    store = Store(url)
    ref = store.write("step", KEY, data, details={"layer": "x"})
    other = Store(url)
    assert other.exists(ref)
    assert {name: other.read_bytes(ref, name) for name in data} == data
    assert list(other.refs("step")) == [ref]
    assert other.traffic.files.read_bytes == sum(len(value) for value in data.values())
    assert store.traffic.files.written_bytes == other.traffic.files.read_bytes
    assert not other.exists(ArtifactRef("step", KEY[::-1]))


def test_a_large_file_moves_in_parts_side_by_side(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    at_once: list[int] = []
    running: set[object] = set()
    calls: list[str] = []
    real = type(store.fs)._call_s3

    async def watched(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        token = object()
        running.add(token)
        calls.append(method)
        at_once.append(len(running))
        try:
            return await real(self, method, *arguments, **options)
        finally:
            running.discard(token)

    monkeypatch.setattr(type(store.fs), "_call_s3", watched)
    data = os.urandom(4 * CHUNK_BYTES)
    ref = store.write("step", KEY, {"large": data})
    assert calls.count("upload_part") == 4
    assert max(at_once) > 1
    calls.clear()
    at_once.clear()
    assert store.read_bytes(ref, "large") == data
    assert calls == ["get_object"] * 4
    assert max(at_once) > 1


def test_the_manifest_comes_last(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    write = store.files.write
    order: list[str] = []

    def note(path: str, data: bytes, *, manifest: bool = False) -> None:
        write(path, data, manifest=manifest)
        order.append(path.rpartition("/")[2])

    monkeypatch.setattr(store.files, "write", note)
    store.write("step", KEY, {str(index): b"x" for index in range(20)})
    assert len(order) == 21
    assert order[-1] == "manifest.json"


def test_what_others_write_and_remove_is_seen(url: str) -> None:
    ours, theirs = Store(url), Store(url)
    ref = ArtifactRef("step", KEY)
    assert not ours.exists(ref)
    theirs.write("step", KEY, {"a": b"1"})
    assert ours.exists(ref)
    remove(theirs, folders(theirs))
    assert not ours.exists(ref)
    assert list(ours.refs("step")) == []


def test_damage_is_named(url: str) -> None:
    store = Store(url)
    ref = store.write("step", KEY, {"a": b"123"})
    store.fs.pipe_file(store.path(ref, "a"), b"12")
    with pytest.raises(StoreError, match="damaged: a: 2 B instead of 3 B"):
        Store(url).exists(ref)
    with pytest.raises(StoreError, match="damaged: a"):
        Store(url).read_bytes(ref, "a")
    assert len(verify(Store(url)).damaged) == 1


# -- the cache ----------------------------------------------------------------------------------------------------


def test_one_download_a_machine(url: str, tmp_path: Path) -> None:
    ref = Store(url).write("step", KEY, {"a": b"1234", "b": b"56"})
    readers = [Store(url, cache=str(tmp_path)) for _ in range(3)]
    for reader in readers:
        assert reader.read_bytes(ref, "a") == b"1234"
    assert [reader.traffic.files.read_bytes for reader in readers] == [4, 0, 0]
    assert [reader.traffic.cached_bytes for reader in readers] == [0, 4, 4]
    writer = Store(url, cache=str(tmp_path))
    mine = writer.write("step", KEY[::-1], {"c": b"789"})
    assert Store(url, cache=str(tmp_path)).read_bytes(mine, "c") == b"789"
    assert writer.traffic.files.read_bytes == 0


def test_the_cache_never_says_that_an_artifact_exists(url: str, tmp_path: Path) -> None:
    store = Store(url, cache=str(tmp_path))
    ref = store.write("step", KEY, {"a": b"1"})
    remove(Store(url), folders(Store(url)))
    assert not store.exists(ref)
    with pytest.raises(StoreError, match="not in the store"):
        Store(url, cache=str(tmp_path)).read_bytes(ref, "a")


def test_only_remote_stores_have_one(tmp_path: Path, url: str) -> None:
    assert Store(f"file://{tmp_path}/x", cache="auto").cache is None
    assert Store("memory://x", cache="auto").cache is None
    assert Store(url, cache="auto").cache is not None
    assert Store(url).cache is None


# -- faults -------------------------------------------------------------------------------------------------------


def test_wrong_credentials_are_one_line_that_tells_no_secret(server: S3Server, url: str) -> None:
    with server.refusing(), pytest.raises(StoreError) as caught:
        Store(url).check_writable()
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not is_transient(caught.value)


def test_a_bucket_that_is_not_there_stays_so(server: S3Server) -> None:
    store = Store("s3://no-such-bucket-here/store")
    for ask in (store.check_writable, lambda: store.exists(ArtifactRef("step", KEY)), lambda: list(store.refs("step"))):
        with pytest.raises(StoreError, match=r"no-such-bucket-here.*NoSuchBucket") as caught:
            ask()
        assert not is_transient(caught.value)


def test_missing_credentials_are_one_line_and_stay_so(server: S3Server, url: str, tmp_path: Path) -> None:
    nobody = {"FSSPEC_S3_KEY": None, "FSSPEC_S3_SECRET": None, "AWS_ACCESS_KEY_ID": None, "AWS_PROFILE": None}
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    with (
        changed_environment({**nobody, **nowhere, "AWS_CONFIG_FILE": str(tmp_path / "none")}),
        pytest.raises(StoreError, match="credentials") as caught,
    ):
        Store(url).check_writable()
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not is_transient(caught.value)


def test_an_address_where_nobody_is_fails_soon_and_can_pass(server: S3Server) -> None:
    with changed_environment({"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9", "FSSPEC_S3_KEY": USER}):
        started = time.monotonic()
        with pytest.raises(StoreError) as caught:
            Store("s3://bucket/x").check_writable()
    assert time.monotonic() - started < 20
    assert is_transient(caught.value)


def test_a_store_that_is_down_for_a_while_is_waited_for(server: S3Server, url: str) -> None:
    store = Store(url)
    ref = store.write("step", KEY, {"a": b"1"})
    with server.down_for(1.5):
        assert Store(url).fs is not None
        assert with_retries(lambda: store.read_bytes(ref, "a")) == b"1"
    with server.down_for(1.5):
        store.write("step", KEY[::-1], {"a": b"1"})
    assert Store(url).exists(ArtifactRef("step", KEY[::-1]))


@pytest.mark.long
def test_patience_ends(server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    ref = store.write("step", KEY, {"a": b"1"})
    monkeypatch.setattr(store.files, "patience", 0.5)
    server.cut()
    try:
        with pytest.raises(StoreError) as caught:
            store.read_bytes(ref, "a")
    finally:
        server.mend()
    assert is_transient(caught.value)
    assert files.can_pass(caught.value.__cause__)


# -- whole runs ---------------------------------------------------------------------------------------------------


def run(path: Path, store: Store | None = None) -> tuple[dict[str, Any], list[Outcome], Store]:
    """One run without Prefect, as a new process would do it."""
    config = RunConfig.from_yaml(path)
    session = Session(config, store or open_store(config))
    outcomes: list[Outcome] = []
    (result,) = run_pipeline(session, InProcess(session, record=outcomes.append), config.budgets)
    return result_json(session, result), outcomes, session.store


def test_the_same_run_on_a_folder_and_on_s3(url: str, tmp_path: Path) -> None:
    for name in ("folder", "s3", "elsewhere"):
        (tmp_path / name).mkdir()
    local, _, folder = run(write_project(tmp_path / "folder"))
    cache = str(tmp_path / "cache")
    engine = {"devices": "cpu", "threads": 1, "cache": cache}
    path = write_project(tmp_path / "s3", store=url, engine=engine)
    remote, outcomes, store = run(path)
    assert not any(outcome.reused for outcome in outcomes)
    assert contents(folder) == contents(Store(url))
    assert remote["artifacts"] == local["artifacts"]
    assert store.traffic.files.read_bytes == 0  # all that was read was made here

    # Once more on this machine: nothing but manifests moves.
    again, outcomes, store = run(path)
    assert all(outcome.reused for outcome in outcomes)
    assert again == remote
    assert (store.traffic.files.reads, store.traffic.files.writes, store.traffic.manifests.writes) == (0, 0, 0)
    assert store.traffic.manifests.reads == len(outcomes) + 1  # of the search's index
    assert store.traffic.cached_bytes > 0

    # On another machine each file that is read is downloaded once.
    engine["cache"] = str(tmp_path / "other-cache")
    path = write_project(tmp_path / "elsewhere", store=url, engine=engine)
    found, outcomes, store = run(path)
    assert all(outcome.reused for outcome in outcomes)
    assert found == remote
    first = store.traffic.files.read_bytes
    assert 0 < first < sum(len(data) for data in contents(Store(url)).values())
    _, _, store = run(path)
    assert store.traffic.files.read_bytes == 0


@pytest.mark.parametrize(
    "step", few(["candidates", "compressed"], "candidates")
)  # then comes a fan-out, then a checkpoint is loaded
def test_a_run_gets_over_a_store_that_is_down(step: str, server: S3Server, url: str, tmp_path: Path) -> None:
    """After ``candidates`` comes a fan-out, after ``compressed`` a checkpoint is loaded."""
    path = write_project(tmp_path, store=url, engine={"devices": "cpu", "threads": 1, "cache": None})
    config = RunConfig.from_yaml(path)
    session = Session(config, open_store(config))
    outcomes: list[Outcome] = []
    timers: list[threading.Timer] = []

    def fault(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.ref.step == step and not timers:
            server.cut()
            timers.append(threading.Timer(2, server.mend))
            timers[0].start()

    run_pipeline(session, InProcess(session, record=fault), config.budgets)
    timers[0].join()
    assert verify(Store(url)).damaged == []
    _, again, _ = run(path)
    assert len(again) == len(outcomes)
    assert all(outcome.reused for outcome in again)


def test_a_step_of_its_own_and_the_command_line(
    server: S3Server, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Credentials reach other processes by fsspec's variables alone."""
    path = write_project(tmp_path, store=url, engine={"devices": "cpu", "threads": 1, "cache": str(tmp_path / "cache")})
    config = RunConfig.from_yaml(path)
    session = Session(config, open_store(config))
    from steps import layers
    from steps.protocol import Description

    spec = layers.spec(session)
    description = Description(spec, config).to_bytes()
    assert SECRET.encode() not in description
    session.store.fs.pipe_file(f"{url}-work/step.json", description)
    done = subprocess.run(
        [sys.executable, "-m", "steps", "layers", "--spec", f"{url}-work/step.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **server.environment, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["key"] == spec.key
    assert session.store.exists(spec.ref)
    listed = prints_json(capsys, "store", "ls", path)
    assert {row["step"] for row in listed["steps"]} == {"layers"}
    assert prints_json(capsys, "store", "verify", "--store", url)["artifacts"] == 1
    assert SECRET not in yaml.safe_dump(listed)
