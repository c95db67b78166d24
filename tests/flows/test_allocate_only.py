"""``rebudget --allocate-only`` after a finished search: without model and data, the same artifacts, and all budgets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import mlorq
from flows.cli import main
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.numbers import byte_count
from steps import search_index
from steps.allocations import run_allocations
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline, run_search
from steps.session import Session
from tests.flows.test_cli import fails, prints_json, write_project

ROOT = Path(mlorq.__file__).parents[1]
WIDTHS = {"bits": 6, "choices": [4, 6, 8], "compute": "4x6", "samples": 8}
BUDGETS = ("3bit", "3.5bit", "15%", "60kB")

# The command in a process of its own, which then tells what it has imported.
COMMAND = """
import sys
from flows.cli import main
status = main(sys.argv[1:])
print(",".join(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
sys.exit(status)
"""


def session_of(path: Path, **overrides: Any) -> Session:
    config = RunConfig.from_yaml(path, {key.replace("__", "."): value for key, value in overrides.items()})
    return Session(config, Store(config.resolve(config.store)))


def search(path: Path, **overrides: Any) -> None:
    """A finished search with its index, as a run leaves it."""
    session = session_of(path, **overrides)
    search_index.keep(session, run_search(session, InProcess(session)))


def searched(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = write_project(folder, **changes)
    search(path)
    return path


def command(path: Path, *options: str, budgets: tuple[str, ...] = BUDGETS) -> tuple[int, dict[str, Any], set[str], str]:
    """Exit status, JSON, names of imported packages, and standard error of the command in a new process."""
    asked = [part for budget in budgets for part in ("--budget", budget)]
    arguments = ["rebudget", str(path), *asked, "--allocate-only", "--json", *options]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode >= 0, done  # killed by a signal
    assert lines, done
    return done.returncode, json.loads(done.stdout or "null"), set(lines[-1].split(",")), "\n".join(lines[:-1])


HEAVY = {"torch", "torchvision", "timm", "transformers", "prefect", "tiny_project"}


def contents(store: Path, step: str) -> dict[str, bytes]:
    """The files of a step's artifacts; of manifests, which hold times, the list of files."""
    found = {}
    for path in sorted((store / step).glob("*/*")):
        data = path.read_bytes()
        if path.name == "manifest.json":
            data = json.dumps({key: json.loads(data)[key] for key in ("key", "files", "details")}).encode()
        found[str(path.relative_to(store))] = data
    return found


@pytest.mark.parametrize(("step", "activations"), [("allocate", None), ("joint", WIDTHS)])
def test_nothing_is_loaded_and_the_artifacts_are_the_same(
    step: str, activations: dict[str, Any] | None, tmp_path: Path
) -> None:
    path = searched(tmp_path, activations=activations)
    store = tmp_path / "store"
    status, found, imported, _ = command(path)
    assert status == 0
    assert "mlorq" in imported
    assert not imported & HEAVY
    ours = contents(store, step)
    assert len({name.split("/")[1] for name in ours}) == len(BUDGETS)
    shutil.rmtree(store / step)
    session = session_of(path)
    executor = InProcess(session)
    results = run_allocations(session, executor, run_search(session, executor), parse_budgets(BUDGETS))
    assert contents(store, step) == ours
    assert [result.budget.text for result in results] == [row["budget"] for row in found["results"]]
    assert found["errors"] == []
    for row in found["results"]:
        assert row["bytes"] <= row["budget_bytes"]
        assert row["steps"]["computed"] == 1
        assert row["steps"]["reused"] == found["steps"]["reused"]
        assert set(row["seconds"]) == {step}, "only what this run computed"
        assert {"layers", "capture", "candidates", "sensitivity"} <= set(row["seconds_reused"])
        assert row["seconds_reused"]["capture"] > 0
        assert step not in row["seconds_reused"]


def test_a_later_run_reuses_the_allocations(tmp_path: Path) -> None:
    path = searched(tmp_path, rounding={"method": "nearest"})
    command(path, budgets=("3bit",))
    session, outcomes = session_of(path), []
    run_pipeline(session, InProcess(session, record=outcomes.append), parse_budgets("3bit"))
    assert {outcome.ref.step for outcome in outcomes if outcome.reused} == {
        "layers",
        "capture",
        "candidates",
        "sensitivity",
        "allocate",
    }


def test_settings_of_the_program_do_not_need_another_search(tmp_path: Path) -> None:
    path = searched(tmp_path)
    changed = ("search.objective=sqnr", "search.solver=highs", "rounding.method=nearest", "budget=5bit")
    options = [part for setting in changed for part in ("--set", setting)]
    status, found, imported, _ = command(path, *options, budgets=())
    assert status == 0
    assert not imported & HEAVY
    assert [row["budget"] for row in found["results"]] == ["5bit"]
    assert found["results"][0]["solver"]["name"] == "highs"


# -- when the index does not count --------------------------------------------------------------------------------


def test_changed_code_of_the_model_is_another_model(tmp_path: Path) -> None:
    path = searched(tmp_path)
    code = tmp_path / "tiny_project.py"
    code.write_text(code.read_text().replace("torch.manual_seed(0)", "torch.manual_seed(1)"))
    os.utime(code, (time.time() + 1,) * 2)
    # A process that has imported the code before still makes the model of the search. It must not say that this one is
    # made from the new file.
    session = session_of(path)
    search_index.keep(session, run_search(session, InProcess(session)))
    assert search_index.load(session_of(path)) is None
    status, _, _, said = command(path, budgets=("3bit",))
    assert status == 2
    assert "step 'layers' of this configuration is not in the store" in said


def test_files_that_the_models_code_reads_count(tmp_path: Path) -> None:
    """Weights read by Python code, and weights read by native code, beside the module or named by an argument."""
    import torch
    from safetensors.torch import save_file

    extra = "\n\ndef read(weights, named):\n"
    extra += "    from safetensors.torch import load_file\n    from pathlib import Path\n"
    extra += "    here = Path(__file__).parent\n    net = build()\n"
    extra += "    scale = torch.load(here / 'deep' / 'scale.pt') * load_file(here / 'beside.safetensors')['w']\n"
    extra += "    net.head.weight.data *= scale * load_file(here / weights['path'])['w'] * load_file(named)['w']\n"
    extra += "    return net\n"
    (tmp_path / "deep").mkdir()
    named = tmp_path / "named.bin"
    model = {
        "family": "custom",
        "factory": "tiny_project:read",
        "arguments": {"weights": {"path": "deep/inner.bin"}, "named": str(named)},
    }
    path = write_project(tmp_path, model=model)
    code = tmp_path / "tiny_project.py"
    code.write_text(code.read_text() + extra)

    def write(name: str, value: float) -> None:
        if name.endswith(".pt"):
            torch.save(torch.tensor(value), tmp_path / name)
        else:
            save_file({"w": torch.tensor(value)}, tmp_path / name)

    names = ("deep/scale.pt", "beside.safetensors", "deep/inner.bin", "named.bin")
    for name in names:
        write(name, 1.0)
    search(path)
    assert search_index.load(session_of(path)) is not None
    for name in names:
        write(name, 2.0)
        assert search_index.load(session_of(path)) is None
        write(name, 1.0)
        assert search_index.load(session_of(path)) is not None


def test_a_file_that_changes_during_the_search_is_another_models(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    session = session_of(path)
    found = run_search(session, InProcess(session))
    code = tmp_path / "tiny_project.py"
    code.write_text(code.read_text() + "\n# edited while the search ran\n")
    search_index.keep(session, found)
    assert search_index.load(session_of(path)) is None


def test_other_settings_of_the_search_have_another_index(tmp_path: Path) -> None:
    path = searched(tmp_path)
    assert search_index.load(session_of(path)) is not None
    for change in (
        {"seed": 1},
        {"search__samples": 8},
        {"model__arguments": {"width": 8}},
        {"embeddings": {"bits": 8}},
    ):
        assert search_index.load(session_of(path, **change)) is None
    for change in ({"search__gap": 1e-3}, {"rounding__iterations": 1}, {"engine__devices": "auto"}):
        assert search_index.load(session_of(path, **change)) is not None


def test_without_an_index_the_model_is_loaded_and_the_index_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    path = searched(tmp_path)
    store = tmp_path / "store"
    first = prints_json(capsys, "rebudget", path, "--budget", "3bit", "--allocate-only")
    (index,) = (store / "search").glob("*/index.json")
    for damage in (index.unlink, lambda: index.write_text("{}"), lambda: shutil.rmtree(store / "search")):
        damage()
        again = prints_json(capsys, "rebudget", path, "--budget", "3bit", "--allocate-only")
        assert again["results"][0]["allocation"] == first["results"][0]["allocation"]
        assert again["steps"] == {"computed": 0, "reused": first["steps"]["reused"] + 1}
        assert search_index.load(session_of(path)) is not None


def test_an_artifact_that_was_removed_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = searched(tmp_path)
    shutil.rmtree(next((tmp_path / "store" / "sensitivity").iterdir()))
    line = fails(capsys, "rebudget", path, "--budget", "3bit", "--allocate-only")
    assert "step 'sensitivity " in line
    assert f"mlorq compress {path}" in line


def test_models_in_memory_have_no_index(tmp_path: Path) -> None:
    from tests.nets import TokenNet, images

    store = f"file://{tmp_path}"
    mlorq.compress(
        TokenNet(width=16, blocks=1),
        [images(4, 1)],
        budget="4bit",
        preset="quick",
        rounding="nearest",
        search={"samples": 4, "points": 2},
        store=store,
    )
    assert list(Store(store).refs("allocate"))
    assert not list(Store(store).refs("search"))


def test_a_store_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = searched(tmp_path)
    shutil.rmtree(tmp_path / "store" / "search")
    session = session_of(path)
    found = run_search(session, InProcess(session))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(session.store, "_put", refuse)
    search_index.keep(session, found)
    assert not list(session.store.refs("search"))


# -- impossible budgets -------------------------------------------------------------------------------------------


def test_an_impossible_budget_is_named_and_the_others_are_solved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    path = searched(tmp_path)
    asked = ("3bit", "0.1bit", "4bit", "100B")
    options = [part for budget in asked for part in ("--budget", budget)]
    found = prints_json(capsys, "rebudget", path, *options, "--allocate-only", status=2)
    assert [row["budget"] for row in found["results"]] == ["3bit", "4bit"]
    assert [row["budget"] for row in found["errors"]] == ["0.1bit", "100B"]
    bits, size = (row["error"] for row in found["errors"])
    smallest = found["results"][0]["smallest_bytes"]
    assert f"the smallest possible is {byte_count(smallest)}" in bits
    least = int(size.partition("the smallest possible is ")[2].partition(" B")[0].replace(",", ""))
    assert main(["rebudget", str(path), *options, "--allocate-only"]) == 2
    out, err = capsys.readouterr()
    assert "3bit" in out
    assert "4bit" in out
    assert [line for line in err.splitlines() if "error" in line] == [f"mlorq: error: {bits}", f"mlorq: error: {size}"]
    # The named sizes are the smallest possible ones.
    again = prints_json(capsys, "rebudget", path, "--budget", f"{least}B", "--allocate-only")
    assert again["results"][0]["bytes"] == smallest
    line = fails(capsys, "rebudget", path, "--budget", f"{least - 1}B", "--allocate-only")
    assert f"the smallest possible is {byte_count(least)}" in line
    assert len(list(Store(f"file://{tmp_path}/store").refs("allocate"))) == 3


def test_a_compute_budget_that_is_impossible_names_every_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = searched(tmp_path, activations=WIDTHS)
    line = fails(capsys, "rebudget", path, "--budget", "3bit", "--allocate-only", "--set", "activations.compute=0.1x4")
    assert "the least possible is" in line


def test_the_flow_names_the_impossible_budget_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    path = searched(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    asked = ("--budget", "3bit", "--budget", "0.1bit", "--allocate-only")

    def refuse(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Session, "_load_model", refuse)
    served = prints_json(capsys, "rebudget", path, *asked, status=2)
    monkeypatch.delenv("PREFECT_API_URL")
    alone = prints_json(capsys, "rebudget", path, *asked, status=2)
    assert served["errors"] == alone["errors"]
    assert [row["allocation"] for row in served["results"]] == [row["allocation"] for row in alone["results"]]
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    line = fails(capsys, "rebudget", path, "--budget", "0.1bit", "--allocate-only")
    assert "budget 0.1bit leaves" in line


# -- the store ----------------------------------------------------------------------------------------------------


def test_the_index_stays_with_the_runs_of_its_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_project(tmp_path, rounding={"method": "nearest"})
    runs = []
    for change in ({}, {"search__samples": 8}):
        session = session_of(path, **change)
        (result,) = run_pipeline(session, InProcess(session), parse_budgets("4bit"))
        assert result.summary is not None
        runs.append(session.store.read_json(result.summary, "run.json")["run"])
    listed = prints_json(capsys, "store", "ls", path)
    assert {row["step"]: row["artifacts"] for row in listed["steps"]}["search"] == 2
    rows = prints_json(capsys, "store", "ls", path, "--step", "search")["artifacts_of_step"]
    assert len(rows) == 2
    assert prints_json(capsys, "store", "verify", path)["damaged"] == []
    prints_json(capsys, "store", "gc", path, "--keep", runs[1])
    assert list(session.store.refs("search")) == [search_index.ref_of(session_of(path, search__samples=8).config)]
    assert search_index.load(session_of(path)) is None
    status, _, imported, _ = command(path, "--set", "search.samples=8", budgets=("5bit",))
    assert status == 0
    assert not imported & HEAVY


def test_the_index_names_the_artifacts_of_the_search(tmp_path: Path) -> None:
    path = searched(tmp_path)
    session = session_of(path)
    ref = search_index.ref_of(session.config)
    manifest = session.store.manifest(ref)
    assert manifest is not None
    named = {ArtifactRef.from_json(value) for value in manifest["details"]["artifacts"]}
    assert {one.step for one in named} == {"layers", "capture", "candidates", "sensitivity"}
    assert all(session.store.exists(one) for one in named)
    assert yaml.safe_load(path.read_text())["budget"] not in session.store.read_bytes(ref, search_index.FILE).decode()
