"""Runs that are killed at random moments and started again: nothing is lost, done twice, wrong or left behind.

Runs start warm (``tests.warm``), so that a kill costs a few seconds. ``MLORQ_KILLS`` sets the number of kills of the
long test, ``MLORQ_KILLS_SEED`` the moments.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.terminal import quiet_stdout
from mlorq.artifacts.gc import (
    TEMPORARY,
    folders,
    needed_by,
    removable,
    remove,
    remove_files,
    strays,
    temporaries,
    verify,
)
from mlorq.artifacts.hashing import digest_bytes
from mlorq.artifacts.store import Store
from mlorq.checkpoint.io import save
from mlorq.config.run import RunConfig
from steps.base import Outcome
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store
from tests.flows.test_cli import write_project
from tests.s3 import s3_server
from tests.warm import Warm

STEPS = 1 + 1 + 6 + 6 + 1 + 1 + 6 + 1 + 1 + 1 + 1
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
OF_A_RUN = ("search", "report")  # no artifacts of steps: the index of a search has paths, the page of a run times
LAST_LINE = "mlorq: interrupted; run the same command again to resume"
MARK = "MLORQ_TEST_KILLS"
PLACES: dict[str, tuple[dict[str, Any], int]] = {  # changes of the configuration, and share of the kills
    "pipeline": ({}, 120),  # without the command line and Prefect, which cost most of the time
    "folder": ({}, 40),
    "threads": ({"engine": {"devices": ["cpu", "cpu"], "threads": 1}}, 14),
    "s3": ({"engine": {"devices": "cpu", "threads": 1, "cache": None}}, 20),
    "processes": ({"engine": {"devices": ["cpu", "cpu"], "threads": 1, "steps": "subprocess"}}, 6),
}


@dataclass
class Tally:
    """What a campaign has met."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    finished: int = 0
    left_over: int = 0
    problems: list[str] = field(default_factory=list)

    def check(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


class Project:
    """A configuration and its store, in a folder of its own.

    Args:
        folder: a new folder.
        url: of the store; None for a folder in it.
        changes: of the configuration.
        call: the function that runs it: the command, or ``compress_without_prefect``.
    """

    def __init__(self, folder: Path, url: str | None, changes: dict[str, Any], call: str = "flows.cli:script") -> None:
        self.call = call
        folder.mkdir()
        self.folder = folder
        self.url = url or f"file://{folder}/store"
        self.config = write_project(folder, rounding={"method": "nearest"}, store=self.url, **changes)

    def command(self) -> list[str]:
        return ["compress", str(self.config), "--json", "--output", str(self.folder / "out")]

    def artifacts(self) -> dict[str, tuple[Any, str]]:
        """Finished steps, with the time and the content of their manifests; those in ``OF_A_RUN`` are not a step's."""
        store = Store(self.url)
        found = {}
        for folder in folders(store):
            if folder.is_artifact and folder.ref.step not in OF_A_RUN:
                text = store.files.read(store.path(folder.ref, "manifest.json"))
                modified = folder.files["manifest.json"].modified
                found[f"{folder.ref.step}/{folder.ref.key}"] = (modified, digest_bytes(text))
        return found

    def contents(self) -> dict[str, str]:
        """Digests of all files but manifests, which hold times, and those in ``OF_A_RUN``."""
        store = Store(self.url)
        found = {}
        for folder in folders(store):
            for name in folder.files:
                if not folder.is_artifact or folder.ref.step in OF_A_RUN or name == "manifest.json":
                    continue
                if not TEMPORARY.fullmatch(name):  # of a writer that was killed; gc removes it
                    data = store.files.read(store.path(folder.ref, name))
                    found[f"{folder.ref.step}/{folder.ref.key}/{name}"] = digest_bytes(data)
        return found

    def files(self) -> int:
        return len(Store(self.url).files.listing(Store(self.url).root))


def compress_without_prefect(arguments: list[str]) -> int:
    """``mlorq compress`` as a program would do it that uses the steps, with the same output."""
    config = RunConfig.from_yaml(arguments[1])
    session, outcomes = Session(config, open_store(config)), list[Outcome]()
    with quiet_stdout():
        (result,) = run_pipeline(session, InProcess(session, record=outcomes.append), config.budgets)
    assert result.checkpoint is not None
    save(session.artifacts.files(result.checkpoint), arguments[-1])
    reused = sum(one.reused for one in outcomes)
    steps = {"computed": len(outcomes) - reused, "reused": reused}
    print(json.dumps({**result_json(session, result), "steps": steps, "wall_seconds": 0}))
    return 0


def outcome(text: str) -> dict[str, Any]:
    """A result without what differs from run to run."""
    result = json.loads(text)
    return {
        name: value
        for name, value in result.items()
        if name
        not in (
            "seconds",
            "seconds_reused",
            "steps",
            "wall_seconds",
            "checkpoint",
            "output",
            "solver",
            "report",
            "picture",
        )
    } | {"objective": result["solver"]["objective"]}


def descendants(mark: str) -> list[int]:
    """Living processes with a mark in their environment: those that a run has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "tmp").mkdir()
    first = Project(folder / "first", None, {})
    environment = {"PREFECT_API_URL": prefect_server, "TMPDIR": str(folder / "tmp")}
    with Warm(folder, ("flows.cli:main", first.command()), environment) as running:
        yield running


@contextlib.contextmanager
def places(name: str) -> Iterator[tuple[Callable[[], str | None], dict[str, str]]]:
    """Gives stores of a kind: a function that returns a new URL, and variables of processes that use it."""
    if name != "s3":
        yield lambda: None, {}
        return
    pytest.importorskip("s3fs")
    with s3_server() as server:
        yield server.new_bucket, server.environment


def moment(rng: random.Random, project: Project, seconds: float, running: Callable[[], bool]) -> None:
    """Wait for a random time, or until a random number of files has been written and a little longer."""
    if rng.random() < 0.5 or not project.url.startswith("file:"):
        time.sleep(rng.uniform(0.1, seconds))
        return
    more, end = project.files() + rng.randrange(1, 12), time.monotonic() + seconds
    while project.files() < more and time.monotonic() < end and running():
        pass
    time.sleep(rng.expovariate(200))


def until_done(
    warm: Warm, project: Project, environment: dict[str, str], rng: random.Random, seconds: float, tally: Tally
) -> str:
    """Run, kill and run again until a run ends by itself; gives its output."""
    before: dict[str, tuple[Any, str]] = {}
    command = project.call == "flows.cli:script"
    signals = [signal.SIGKILL, signal.SIGTERM, *([signal.SIGINT] if command else [])]
    for turn in range(50):
        mark = f"{project.folder}-{turn}"
        process = warm.start(project.call, project.command(), **environment, **{MARK: mark})
        tally.runs += 1
        sign = rng.choice(signals)
        temporary = {path.name for path in (warm.folder / "tmp").iterdir()}
        moment(rng, project, seconds, lambda process=process: process.poll() is None)
        sent = process.send(sign)
        status = process.wait()
        deadline = time.monotonic() + 60
        while (alive := descendants(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        where = f"{project.folder.name}, turn {turn}, {sign.name}"
        tally.check(not alive, f"{where}: processes {alive} outlive it")
        now = project.artifacts()
        tally.check(before.items() <= now.items(), f"{where}: lost or made again {before.keys() - now.keys()}")
        if status == 0:
            steps = json.loads(process.out)["steps"]
            tally.check(
                steps == {"computed": STEPS - len(before), "reused": len(before)}, f"{where}: {steps}, {len(before)}"
            )
            return process.out
        before = now
        tally.kills[sign.name] += 1
        tally.check("Traceback" not in process.err, f"{where}: {process.err[-3000:]}")
        if status == -sign:  # after the result, while Python ends; or SIGKILL
            tally.check(
                not command or sign == signal.SIGKILL or "wall_seconds" in process.out, f"{where}: ended without a word"
            )
            continue
        tally.check(sent and status == STATUS[sign], f"{where}: status {status}: {process.err[-1500:]}")
        if sign != signal.SIGKILL:
            lines = process.err.splitlines()
            tally.check(bool(lines) and lines[-1] == LAST_LINE, f"{where}: {lines[-3:]}")
            left = {path.name for path in (warm.folder / "tmp").iterdir()} - temporary
            tally.check(not left, f"{where}: {left} left behind")
    raise AssertionError(f"{project.folder} does not come to an end")


def clean_up(project: Project, run: str) -> int:
    """``store gc`` a day later; gives the number of files that it removed."""
    store = Store(project.url)
    before = project.files()
    if store.is_local:
        for folder in folders(store):
            listed = {*(store.manifest(folder.ref) or {})["files"], "manifest.json"} if folder.is_artifact else set()
            for name in folder.files.keys() - listed:
                os.utime(store.path(folder.ref, name), (1, 1))
        for path in (Path(store.root) / "leases").rglob("*"):
            os.utime(path, (1, 1))
        for path in Path(store.root).glob(".probe-*"):
            os.utime(path, (1, 1))
        assert main(["store", "gc", "--store", project.url, "--keep", run, "--json"]) == 0
    else:
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)
        everything = folders(store)
        remove(store, removable(everything, needed_by(store, [run]), later))
        remove_files(store, temporaries(everything, later))
        for path in strays(store, later):
            store.leases.discard(path)
    return before - project.files()


def campaign(warm: Warm, folder: Path, place: str, kills: int, seed: int) -> Tally:
    """Kill runs of one kind until there were so many kills."""
    rng, tally, changes = random.Random(seed), Tally(), PLACES[place][0]
    call = "tests.e2e.test_kills:compress_without_prefect" if place == "pipeline" else "flows.cli:script"
    with places(place) as (new_url, environment):
        undisturbed = Project(folder / "undisturbed", new_url(), changes, call)
        started = time.monotonic()
        process = warm.start(call, undisturbed.command(), **environment)
        assert process.wait() == 0, process.err
        seconds = time.monotonic() - started
        expected, contents = outcome(process.out), undisturbed.contents()
        while sum(tally.kills.values()) < kills:
            project = Project(folder / f"run{tally.finished}", new_url(), changes, call)
            found = until_done(warm, project, environment, rng, seconds, tally)
            tally.finished += 1
            where = f"{place} {project.folder.name}"
            tally.check(outcome(found) == expected, f"{where}: another result: {outcome(found)}")
            tally.check(project.contents() == contents, f"{where}: other files")
            for name in ("model.safetensors", "mlorq.json"):
                made, other = (one.folder / "out" / name for one in (project, undisturbed))
                tally.check(made.read_bytes() == other.read_bytes(), f"{where}: another {name}")
            tally.left_over += clean_up(project, expected["run"])
            store = Store(project.url)
            listed = {
                f"{one.ref.step}/{one.ref.key}/{name}"
                for one in folders(store)
                for name in ("manifest.json", *(store.manifest(one.ref) or {"files": {}})["files"])
            }
            left = store.files.listing(store.root).keys() - listed
            tally.check(not left, f"{where}: left behind: {left}")
            findings = verify(store)
            tally.check(not findings.damaged and not findings.left_over, f"{where}: {findings.damaged}")
            tally.check(project.contents() == contents, f"{where}: gc removed something")
    return tally


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", PLACES)
def test_runs_that_are_killed(place: str, warm: Warm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kills = int(os.environ.get("MLORQ_KILLS", "200")) * PLACES[place][1] // 200
    tally = campaign(warm, tmp_path, place, kills, int(os.environ.get("MLORQ_KILLS_SEED", "1")))
    with capsys.disabled():
        print(
            f"\n{place}: {dict(tally.kills)} kills, {tally.runs} runs, {tally.finished} finished, "
            f"{tally.left_over} files left over, {len(tally.problems)} problems",
            *tally.problems,
            sep="\n",
        )
    assert not tally.problems, "\n".join(tally.problems)


# -- several runs at a time ---------------------------------------------------------------------------------------


def concurrent(warm: Warm, folder: Path, count: int, attempts: int = 10) -> None:
    """Runs of one configuration at once, with ``gc`` and ``verify`` beside them: every step is done once."""
    project = Project(folder / "project", None, {})
    process = warm.start("flows.cli:script", project.command())
    assert process.wait() == 0, process.err
    earlier = json.loads(process.out)["run"]
    before = project.artifacts()
    command = ["compress", str(project.config), "--json", "--budget", "3.5bit"]
    runs = [warm.start("flows.cli:script", command) for _ in range(count)]
    collected = verified = 0
    # While all of them work: afterwards, gc would rightly remove the budget that it is not told to keep.
    while all(run.poll() is None for run in runs):
        gc = warm.start("flows.cli:script", ["store", "gc", "--store", project.url, "--keep", earlier])
        assert gc.wait() in (0, 2)
        assert gc.status == 0 or "try again when it has ended" in gc.err
        if gc.status == 0 and any(run.poll() is not None for run in runs):
            assert attempts > 1, "gc never ran while all of them worked"
            assert not [run.err for run in runs if run.wait() != 0]
            (folder / "again").mkdir()
            return concurrent(warm, folder / "again", count, attempts - 1)  # it may have worked after they had ended
        collected += 1
        check = warm.start("flows.cli:script", ["store", "verify", "--store", project.url])
        assert check.wait() == 0, check.err
        verified += 1
    assert not [run.err for run in runs if run.wait() != 0]
    results = [json.loads(run.out) for run in runs]
    assert all(outcome(run.out) == outcome(runs[0].out) for run in runs)
    made = project.artifacts()
    assert before.items() <= made.items()
    assert sum(result["steps"]["computed"] for result in results) == len(made) - len(before) > 6
    assert all(sum(result["steps"].values()) == STEPS for result in results)
    assert min(collected, verified) >= 1
    assert verify(Store(project.url)).damaged == []


@pytest.mark.long
def test_two_runs_at_once_with_gc_and_verify(warm: Warm, tmp_path: Path) -> None:
    concurrent(warm, tmp_path, 2)


@pytest.mark.long
def test_eight_runs_at_once_with_gc_and_verify(warm: Warm, tmp_path: Path) -> None:
    concurrent(warm, tmp_path, 8)
