"""``mlorq store ls``, ``verify`` and ``gc`` on stores of every kind."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from mlorq.artifacts.gc import folders, needed_by, removable, remove, remove_files, temporaries, verify
from mlorq.artifacts.store import ArtifactRef, Store, json_bytes
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import StoreError
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session
from tests.flows.test_cli import fails, prints_json, write_project

KEY = "0123456789abcdef" * 2


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store" if request.param == "file" else f"memory://{tmp_path.name}")


def summary(store: Store, name: str, key: str, made: list[ArtifactRef]) -> ArtifactRef:
    artifacts = {str(index): ref.to_json() for index, ref in enumerate(made)}
    return store.write("summary", key, {"run.json": json_bytes({"run": name, "artifacts": artifacts})})


def test_folders_lists_artifacts_and_left_overs(store: Store) -> None:
    assert folders(store) == []
    ref = store.write("step", KEY, {"a": b"12", "deep/b": b"345"})
    store.files.write(store.path(ArtifactRef("step", "f" * 32), "a"), b"6")
    store.check_writable()
    found = {folder.ref: folder for folder in folders(store)}
    assert found[ref].is_artifact
    assert set(found[ref].files) == {"a", "deep/b", "manifest.json"}
    assert found[ref].bytes > 5
    assert [folder.bytes for folder in found.values() if not folder.is_artifact] == [1]


def test_verify_names_what_is_damaged(store: Store) -> None:
    good = store.write("step", KEY, {"a": b"12"})
    bad = store.write("step", KEY[::-1], {"a": b"12", "b": b"3"})
    store.files.write(store.path(bad, "a"), b"21")  # of the same size
    done: list[tuple[int, int]] = []
    findings = verify(store, lambda *count: done.append(count))
    assert findings.artifacts == 2
    assert len(findings.damaged) == 1
    assert store.uri(bad) in findings.damaged[0]
    assert "digest" in findings.damaged[0]
    assert done == [(1, 2), (2, 2)]
    assert store.exists(good)


def test_gc_keeps_what_a_run_needs(store: Store) -> None:
    shared, mine, others = (store.write("step", f"{index}" * 32, {"a": b"1"}) for index in (1, 2, 3))
    kept = summary(store, "first", "a" * 32, [shared, mine])
    summary(store, "second", "b" * 32, [shared, others])
    curve = store.write("sweep", "c" * 32, {"x": b"1"}, details={"runs": ["first"]})
    both = store.write("sweep", "d" * 32, {"x": b"1"}, details={"runs": ["first", "second"]})
    with pytest.raises(StoreError, match=r"no run 'third'.*known: first, second"):
        needed_by(store, ["third"])
    gone = removable(folders(store), needed_by(store, ["first"]))
    assert {folder.ref for folder in gone} == {others, ArtifactRef("summary", "b" * 32), both}
    remove(store, gone)
    assert {folder.ref for folder in folders(store)} == {shared, mine, kept, curve}
    assert all(store.exists(ref) for ref in (shared, mine, kept, curve))
    assert not store.exists(others)


def test_gc_leaves_young_left_overs_alone(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    ref = ArtifactRef("step", KEY)
    store.files.write(store.path(ref, "a"), b"1")
    kept = {store.write("step", KEY[::-1], {"a": b"1"})}
    everything = folders(store)
    assert removable(everything, kept) == []  # a run may be writing it
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)
    assert [folder.ref for folder in removable(everything, kept, later)] == [ref]


def test_gc_never_touches_what_is_not_the_stores(tmp_path: Path) -> None:
    """A store may lie in a folder or bucket with other things in it."""
    store = Store(f"file://{tmp_path}")
    gone = store.write("step", KEY, {"a": b"1"})
    strangers = ["me.jpg", "photos/me.jpg", "photos/2019/me.jpg", "site/app/manifest.json", f"photos/{KEY}/me.jpg"]
    for name in strangers:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"mine")
        os.utime(file, (1, 1))
    everything = folders(store)
    remove(store, removable(everything, set()))
    assert not store.exists(gone)
    assert all((tmp_path / name).read_bytes() == b"mine" for name in strangers)
    assert verify(store).damaged == []


def test_gc_removes_what_a_killed_writer_left_in_an_artifact(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", KEY, {"a": b"1", "b.tmp": b"2"})
    left = tmp_path / "step" / KEY / f"a.{'f' * 32}.tmp"
    left.write_bytes(b"half")
    assert temporaries(folders(store)) == []  # somebody may be writing it
    os.utime(left, (1, 1))
    found = temporaries(folders(store))
    assert [list(folder.files) for folder in found] == [[left.name]]
    remove_files(store, found)
    assert store.exists(ref)
    assert store.read_bytes(ref, "b.tmp") == b"2"
    assert not left.exists()


def test_an_interrupted_gc_damages_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        store.write("step", f"{index}" * 32, {"a": b"1"})

    def stop(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.files, "remove_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        remove(store, folders(store))
    assert verify(Store(store.url)).damaged == []
    assert list(store.refs("step")) == []


# -- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A project with a run at each of two budgets."""
    path = write_project(tmp_path_factory.mktemp("runs"), rounding={"method": "nearest"})
    config = RunConfig.from_yaml(path)
    session = Session(config, Store(config.resolve(config.store)))
    results = run_pipeline(session, InProcess(session), parse_budgets(["3bit", "4bit"]))
    return path, [result_json(session, result) for result in results]


def test_store_commands(two_runs: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    path, (three, four) = two_runs
    listed = prints_json(capsys, "store", "ls", path)
    by_step = {row["step"]: row["artifacts"] for row in listed["steps"]}
    assert by_step["candidates"] == 6
    assert by_step["summary"] == 2
    rows = prints_json(capsys, "store", "ls", path, "--step", "candidates")["artifacts_of_step"]
    assert sorted(row["layer"] for row in rows) == sorted(row["layer"] for row in three["allocation"])
    assert "steps: allocate" in fails(capsys, "store", "ls", path, "--step", "nosuch")
    assert prints_json(capsys, "store", "verify", path)["damaged"] == []
    assert "--keep RUN" in fails(capsys, "store", "gc", path)
    assert "no run 'x'" in fails(capsys, "store", "gc", path, "--keep", "x")

    planned = prints_json(capsys, "store", "gc", path, "--keep", four["run"], "--dry-run")["removed"]
    assert prints_json(capsys, "store", "ls", path)["artifacts"] == listed["artifacts"]
    assert prints_json(capsys, "store", "gc", path, "--keep", four["run"])["removed"] == planned
    assert planned["artifacts"] > 0
    assert prints_json(capsys, "store", "ls", path)["artifacts"] == listed["artifacts"] - planned["artifacts"]
    assert [row["run"] for row in prints_json(capsys, "runs", path)["runs"]] == [four["run"]]
    config = RunConfig.from_yaml(path)
    session = Session(config, Store(config.resolve(config.store)))
    outcomes: list[Any] = []
    (again,) = run_pipeline(session, InProcess(session, record=outcomes.append), parse_budgets("4bit"))
    assert all(outcome.reused for outcome in outcomes)
    assert result_json(session, again) == four

    (damaged,) = (path.parent / "store").glob("capture/*/reference.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    os.utime(damaged, (time.time() - 1e6,) * 2)
    assert main(["store", "verify", str(path)]) == 2
    out, err = capsys.readouterr()
    assert str(damaged.parent) in err
    assert "artifacts" in out


def test_artifacts_of_a_step_that_no_longer_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of an earlier version, whose allocation is of step ``refine``: listed, kept or removed, and run again."""
    path = write_project(tmp_path, rounding={"method": "nearest"})
    config = RunConfig.from_yaml(path)
    store = Store(config.resolve(config.store))

    def run_again() -> tuple[dict[str, Any], set[str]]:
        session, outcomes = Session(config, Store(store.url)), []
        (result,) = run_pipeline(session, InProcess(session, record=outcomes.append), parse_budgets("4bit"))
        return result_json(session, result), {outcome.ref.step for outcome in outcomes if not outcome.reused}

    result, _ = run_again()
    program = ArtifactRef.from_json(result["artifacts"]["allocation"])
    files = {name: store.read_bytes(program, name) for name in ("allocation.parquet", "allocation.json")}
    refined = store.write("refine", KEY, files)
    artifacts = result["artifacts"] | {"allocation": refined.to_json(), "program": program.to_json()}
    (summary_ref,) = store.refs("summary")
    earlier = result | {"run": "earlier", "artifacts": artifacts, "measured_cost": 0.5}
    picture = {"report.png": store.read_bytes(summary_ref, "report.png")}
    store.write("summary", KEY, {"run.json": json_bytes(earlier)} | picture)

    listed = {row["step"]: row["artifacts"] for row in prints_json(capsys, "store", "ls", path)["steps"]}
    assert (listed["refine"], listed["summary"]) == (1, 2)
    assert len(prints_json(capsys, "store", "ls", path, "--step", "refine")["artifacts_of_step"]) == 1
    assert prints_json(capsys, "store", "verify", path)["damaged"] == []
    assert {row["run"] for row in prints_json(capsys, "runs", path)["runs"]} == {"earlier", result["run"]}
    assert main(["report", "earlier", str(path)]) == 0
    capsys.readouterr()

    prints_json(capsys, "store", "gc", path, "--keep", "earlier")
    assert store.exists(refined)
    again, computed = run_again()
    assert computed == {"summary"}
    assert again["artifacts"] == result["artifacts"]
    prints_json(capsys, "store", "gc", path, "--keep", result["run"])
    assert list(store.refs("refine")) == []
    assert run_again()[1] == set()
