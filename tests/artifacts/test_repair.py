"""``mlorq store verify --repair``: damage of any artifact of a run is named, removed and computed again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from mlorq.artifacts.repair import derived_from
from mlorq.artifacts.store import ArtifactRef, Store, table_bytes
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import StoreError
from steps.faults import is_transient
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session
from tests.flows.test_cli import fails, prints_json, write_project


def run(path: Path) -> set[ArtifactRef]:
    """Run the project; returns the artifacts that were computed."""
    config = RunConfig.from_yaml(path)
    session, outcomes = Session(config, Store(config.resolve(config.store))), []
    run_pipeline(session, InProcess(session, record=outcomes.append), parse_budgets("4bit"))
    return {outcome.ref for outcome in outcomes if not outcome.reused}


def contents(path: Path, step: str) -> dict[str, bytes]:
    return {
        str(file.relative_to(path.parent)): file.read_bytes()
        for file in (path.parent / "store" / step).rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_project(tmp_path_factory.mktemp("repair"), rounding={"method": "nearest"})
    run(path)
    return path


@pytest.mark.long
def test_damage_of_every_kind_is_named_removed_and_computed_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = finished.parent / "store", contents(finished, "compressed")
    assert checkpoint
    steps = sorted(one.name for one in folder.iterdir() if any(one.glob("*/manifest.json")))
    assert {"layers", "capture", "candidates", "round", "compressed", "summary"} <= set(steps)
    for step in steps:
        damaged = min((folder / step).glob("*/manifest.json")).parent
        flip(max(file for file in damaged.rglob("*") if file.is_file() and file.name != "manifest.json"))
        assert main(["store", "verify", str(finished)]) == 2
        message = capsys.readouterr().err
        assert f"{step}/{damaged.name} is damaged" in message, step
        shown = prints_json(capsys, "store", "verify", str(finished), "--repair")
        assert len(shown["damaged"]) == 1, step
        assert f"{step}/{damaged.name}" in shown["removed"]
        assert not damaged.exists()
        again = {f"{ref.step}/{ref.key}" for ref in run(finished)}
        assert again <= set(shown["removed"]), step
        assert set(shown["removed"]) - again <= {one for one in shown["removed"] if one.startswith(("search/",))}, step
        assert contents(finished, "compressed") == checkpoint, step
    assert prints_json(capsys, "store", "verify", str(finished))["damaged"] == []


def test_damaged_manifests_are_repaired(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = contents(finished, "compressed")
    (manifest,) = (finished.parent / "store" / "capture").glob("*/manifest.json")
    manifest.write_bytes(b"{}")
    shown = prints_json(capsys, "store", "verify", str(finished), "--repair")
    assert any(one.startswith("compressed/") for one in shown["removed"])
    run(finished)
    assert contents(finished, "compressed") == checkpoint


def test_only_what_is_derived_is_removed(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")

    def write(step: str, digit: str, *made_from: ArtifactRef, **details: Any) -> ArtifactRef:
        inputs = {str(index): ref.to_json() for index, ref in enumerate(made_from)}
        return store.write(step, digit * 32, {"a": b"1"}, details={"inputs": inputs, **details})

    first, other = write("one", "1"), write("one", "2")
    model = write("two", "3", model={"model": "m", "activations": first.to_json()})
    last, kept = write("summary", "4", model), write("summary", "5", other)
    curve = write("sweep", "6", runs=["net-4bit-44444444", "net-3bit-55555555"])
    write("sweep", "7", runs=["net-3bit-55555555"])
    assert {folder.ref for folder in derived_from(store, [first])} == {first, model, last, curve}
    assert {folder.ref for folder in derived_from(store, [kept])} >= {kept, curve}
    assert derived_from(store, []) == []


def test_nothing_is_removed_while_a_run_uses_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(f"file://{tmp_path}")
    ref = store.write("step", "a" * 32, {"a": b"12"})
    Path(store.path(ref, "a")).write_bytes(b"21")
    with store.leases.hold("runs", "a run"):
        assert "a run" in fails(capsys, "store", "verify", "--repair", "--store", store.url)
    assert Path(store.path(ref, "a")).exists()
    assert main(["store", "verify", "--repair", "--store", store.url]) == 0
    assert not Path(store.path(ref)).exists()


def test_a_damaged_table_is_no_fault_of_the_network(tmp_path: Path) -> None:
    good = table_bytes(pa.table({"x": list(range(1000)), "y": [str(index) for index in range(1000)]}))
    store, kinds = Store(f"file://{tmp_path}"), set()
    for index in range(40):
        data = bytearray(good)
        start = index * len(good) // 40
        data[start : start + 8] = bytes(8)
        ref = store.write("step", f"{index:032x}", {"t.parquet": bytes(data)})
        try:
            pq.read_table(io.BytesIO(bytes(data)))
        except Exception as error:
            kinds.add(type(error))
            with pytest.raises(StoreError, match=r"is damaged: t\.parquet") as caught:
                store.read_table(ref, "t.parquet")
            assert not is_transient(caught.value)
            assert "\n" not in str(caught.value)
    assert OSError in kinds
