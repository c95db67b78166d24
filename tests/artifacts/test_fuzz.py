"""Random damage of a real store: what is read is equal or refused, ``verify`` finds it, and a repair loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st

from flows.cli import main
from mlorq.artifacts.gc import verify
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import MlorqError, StoreError
from steps.faults import is_transient
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session
from tests.flows.test_cli import write_project
from tests.fuzzing import changed, counts, damage, fuzz, one_line

PROJECTS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": {"method": "nearest"}},
    "brecq": {
        "preset": "best",
        "search": {"points": 2, "samples": 8, "forms": ["Q", "QLR", "TCQ"]},
        "rounding": {"method": "brecq", "iterations": 5, "tuning": 5},
        "activations": {"bits": 8},
    },
}
RESULTS = ("compressed", "evaluate")  # what a run is made for


class Project:
    """A finished run: its store, as it was, and how to run it again."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.path = write_project(folder, **changes)
        self.folder = folder / "store"
        self.run()
        self.whole = self.contents()
        self.results = self.result_files()
        self.store = Store(f"file://{self.folder}")
        refs = [ArtifactRef(*name.split("/")[:2]) for name in self.whole if name.endswith("/manifest.json")]
        self.values = {ref: self.read(ref) for ref in refs}

    def run(self) -> None:
        """Run, or complete, the flow."""
        config = RunConfig.from_yaml(self.path)
        session = Session(config, Store(config.resolve(config.store)))
        run_pipeline(session, InProcess(session), parse_budgets("4bit"))

    def contents(self) -> dict[str, bytes]:
        """All files of the store."""
        files = (file for file in self.folder.rglob("*") if file.is_file())
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in files}

    def result_files(self) -> dict[str, bytes]:
        """Files of the results, as a reader gets them from the store."""
        store = Store(f"file://{self.folder}")
        found = {}
        for step in RESULTS:
            for ref in store.refs(step):
                for name in (store.manifest(ref) or {})["files"]:
                    found[f"{ref.step}/{ref.key}/{name}"] = store.read_bytes(ref, name)
        return found

    def restore(self) -> None:
        """Make the store what it was."""
        now = self.contents()
        for name in now.keys() - self.whole.keys():
            (self.folder / name).unlink()
        for name, data in self.whole.items():
            if now.get(name) != data:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(data)

    def read(self, ref: ArtifactRef) -> dict[str, Any]:
        """All that the next step can read of an artifact, as it reads it."""
        store = Store(f"file://{self.folder}")
        if not store.exists(ref):
            return {}
        readers: dict[str, Callable[..., Any]] = {
            "parquet": store.read_table,
            "safetensors": store.read_tensors,
            "json": store.read_json,
        }
        manifest = store.manifest(ref) or {}
        found = {name: readers.get(name.rpartition(".")[2], store.read_bytes)(ref, name) for name in manifest["files"]}
        return found | {"": {key: manifest[key] for key in ("details", "seconds", "created")}}


def equal(left: Any, right: Any) -> bool:
    """Whether two values are the same, tables and tensors included."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, pa.Table):
        return bool(left.equals(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    return bool(left == right)


@st.composite
def broken(draw: st.DrawFn, project: Project) -> dict[str, bytes | None]:
    """New contents of one or two files of the store; None for a file that is removed."""
    names = sorted(project.whole)
    name = draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["bytes", "bytes", "manifest", "manifest", "remove", "swap", "copy", "folders", "one"]))
    event(kind)
    data = project.whole[name]
    if kind == "manifest":
        name = draw(st.sampled_from([each for each in names if each.endswith("manifest.json")]))
        with contextlib.suppress(ValueError):  # numbers of more digits than Python writes
            return {name: json.dumps(draw(changed(json.loads(project.whole[name]), 2)), indent=1).encode()}
        return {name: b"[]"}
    if kind == "remove":
        return {name: None}
    if kind in ("swap", "copy"):  # a file of another artifact, of the same kind where there is one
        alike = [each for each in names if each != name and each.rpartition("/")[2] == name.rpartition("/")[2]]
        other = draw(st.sampled_from(alike or [each for each in names if each != name]))
        return {name: project.whole[other], **({other: data} if kind == "swap" else {})}
    if kind == "folders":  # two artifacts of a step change places
        mine = name.rpartition("/")[0].split("/")[:2]
        others = sorted({tuple(each.split("/")[:2]) for each in names if each.split("/")[0] == mine[0]} - {tuple(mine)})
        assume(others)
        here, there = "/".join(mine), "/".join(draw(st.sampled_from(others)))
        changes: dict[str, bytes | None] = {}
        for source, target in ((here, there), (there, here)):
            moved = {each: content for each, content in project.whole.items() if each.startswith(f"{source}/")}
            changes |= {each: changes.get(each) for each in moved if each not in changes}
            changes |= {f"{target}{each[len(source) :]}": content for each, content in moved.items()}
        return changes
    if kind == "one" and data:  # a single bit
        at = draw(st.integers(0, len(data) - 1))
        return {name: data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]}
    return {name: draw(damage(data))}


def told(error: MlorqError, touched: set[ArtifactRef]) -> None:
    """Check that an error is one line that names a damaged artifact, and is not worth a retry."""
    one_line(error)
    assert any(f"{ref.step}/{ref.key}" in str(error) for ref in touched), error
    assert not is_transient(error)


def of(names: Any) -> set[ArtifactRef]:
    return {ArtifactRef(*name.split("/")[:2]) for name in names}


@pytest.fixture(scope="module", params=["nearest", pytest.param("brecq", marks=pytest.mark.long)])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    torch.set_num_threads(1)
    return Project(tmp_path_factory.mktemp("fuzz"), **PROJECTS[request.param])


@counts(6, 600)
def test_damage_is_found_and_repaired(project: Project, count: int) -> None:
    outcomes: Counter[str] = Counter()

    @fuzz(count)
    @given(broken(project), st.integers(0, 7))
    def check(changes: dict[str, bytes | None], repair: int) -> None:
        changes = {name: data for name, data in changes.items() if data != project.whole.get(name)}
        assume(changes)
        touched = of(changes)
        project.restore()
        for name, data in changes.items():
            if data is None:
                (project.folder / name).unlink(missing_ok=True)
            else:
                (project.folder / name).write_bytes(data)
        outcomes["tried"] += 1

        # The next step reads the same, or is told; no retry.
        refused = set()
        for ref in touched:
            try:
                found = project.read(ref)
                assert not found or equal(found, project.values[ref]), ref
                refused |= set() if found else {ref}
            except MlorqError as error:
                told(error, {ref})
                refused.add(ref)

        findings = verify(Store(f"file://{project.folder}"))
        left_over = {folder.ref for folder in findings.left_over}
        gone = {ref for ref in touched if not Path(project.store.path(ref, "manifest.json")).exists()}
        assert set(findings.refs) == refused - gone
        assert left_over <= gone
        for message in findings.damaged:
            one_line(StoreError(message))
        outcomes["refused" if refused else "equal"] += 1

        if repair == 0:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                status = main(["store", "verify", str(project.path)])
                assert status == (2 if findings.refs else 0), said.getvalue()
                assert main(["store", "verify", "--repair", str(project.path)]) == 0, said.getvalue()
            project.run()
            assert project.result_files() == project.results
            assert verify(Store(f"file://{project.folder}")).damaged == []
            # The index of the search is of no step: there is none if a module has changed since its import.
            assert {ref for ref in project.values if ref.step != "search"} <= of(project.contents())
            outcomes["repaired"] += 1
            return
        try:
            project.run()
        except MlorqError as error:
            told(error, touched)
            outcomes["run refused"] += 1
        else:
            try:
                assert project.result_files() == project.results
                outcomes["run equal"] += 1
            except StoreError as error:
                one_line(error)
                outcomes["result refused"] += 1

    try:
        check()
    finally:
        project.restore()
    print(dict(outcomes))
    assert outcomes["refused"] > outcomes["tried"] * 3 // 4
    assert outcomes["repaired"] > 0 or count < 100
