"""Whole runs through Prefect: reuse, budgets, faults, interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steps
from flows import commands, garbage, pipeline
from flows.cli import main
from flows.executor import PrefectExecutor
from flows.failures import failed_name
from flows.progress import Observers
from flows.run import open_session
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError, ModelError, StoreError
from mlorq.numbers import byte_count, duration
from steps import layers
from steps.base import execute
from steps.faults import is_transient
from tests.flows.test_cli import LAYERS, fails, prints_json, write_project

STEPS = 1 + 1 + 6 + 6 + 1 + 1 + 6 + 1 + 1 + 1 + 1
SHARED_STEPS = 1 + 1 + 6 + 6 + 1  # that every budget stands on

pytestmark = pytest.mark.usefixtures("prefect_server")


def contents(store: Path) -> dict[str, tuple[int, int]]:
    """Every file of a store with its size and its time of change."""
    return {
        str(path.relative_to(store)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def steps_in(found: dict[str, tuple[int, int]]) -> int:
    """Number of finished steps in ``contents``; the index of the search is not a step's."""
    return sum(name.endswith("manifest.json") and not name.startswith("search/") for name in found)


def artifacts(store: Path, step: str) -> int:
    return len(list(store.glob(f"{step}/*/manifest.json")))


def flow_runs(name: str) -> list[Any]:
    """Flow runs of a name, newest first."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        return list(
            client.read_flow_runs(
                flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])),
                sort=FlowRunSort.START_TIME_DESC,
                limit=50,
            )
        )


def task_states(flow_run: Any, expected: int) -> Counter[str]:
    """States of a flow run's task runs; they reach the server a little after the run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import TaskRunSort

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    states: Counter[str] = Counter()
    with get_client(sync_client=True) as client:
        for _ in range(300):
            found = client.read_task_runs(flow_run_filter=chosen, limit=200, sort=TaskRunSort.ID_DESC)
            states = Counter(run.state_name for run in found)
            if sum(count for state, count in states.items() if state not in ("Pending", "Running")) >= expected:
                break
            time.sleep(0.1)
    return states


class Finished:
    """A project with one finished run, made once for the tests that only read it or add to it."""

    def __init__(self, folder: Path) -> None:
        self.config = write_project(folder)
        self.store = folder / "store"
        self.result: dict[str, Any] = {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Finished:
    project = Finished(tmp_path_factory.mktemp("finished"))
    output = project.config.parent / "result.json"
    with pytest.MonkeyPatch.context() as patch, output.open("w") as file:
        patch.setattr(sys, "stdout", file)
        assert main(["compress", str(project.config), "--output", str(output.parent / "out"), "--json"]) == 0
    project.result = json.loads(output.read_text())
    return project


# -- results ----------------------------------------------------------------------------------------------------


def test_result_has_what_is_promised(finished: Finished) -> None:
    result = finished.result
    promised = (
        "run budget budget_bytes bytes rest_bytes file_bytes float_bytes predicted_cost nmse metric allocation steps "
        "seconds checkpoint solver"
    )
    assert set(promised.split()) <= set(result)
    assert result["steps"] == {"computed": STEPS, "reused": 0}
    assert result["budget"] == "4bit"
    assert result["bytes"] <= result["budget_bytes"]
    assert sorted(row["layer"] for row in result["allocation"]) == sorted(LAYERS)
    assert sum(row["bytes"] for row in result["allocation"]) == result["bytes"]
    assert set(result["metric"]) == {"name", "float", "compressed"}
    assert {"name", "status", "objective", "bound", "gap", "seconds"} <= set(result["solver"])
    optional = {"activations", "embeddings", "export", "joint", "reconstruct", "table_costs", "tune", "width_costs"}
    assert set(result["seconds"]) == set(steps.REGISTRY) - optional
    assert 0 < result["nmse"] < 0.2
    assert result["wall_seconds"] > 0


def test_output_is_the_checkpoint(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished.config.parent / "out"
    checkpoint = Path(finished.result["checkpoint"].removeprefix("file://"))
    for name in ("model.safetensors", "mlorq.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    info = prints_json(capsys, "inspect", out)
    assert info["sizes"]["bytes"] == finished.result["bytes"]
    assert info["file_bytes"] == finished.result["file_bytes"]
    assert main(["inspect", str(out)]) == 0
    out_text = capsys.readouterr().out
    assert all(layer in out_text for layer in LAYERS)


def test_evaluate_finds_what_the_run_found(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished.store)
    found = prints_json(capsys, "evaluate", finished.result["checkpoint"], finished.config)
    assert contents(finished.store) == before
    assert found["nmse"] == pytest.approx(finished.result["nmse"], rel=1e-5)
    for which in ("float", "compressed"):
        assert found["metric"][which] == pytest.approx(finished.result["metric"][which], rel=1e-4)
    assert main(["evaluate", finished.result["checkpoint"], str(finished.config)]) == 0
    assert "output NMSE" in capsys.readouterr().out


def test_runs_lists_it(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    rows = prints_json(capsys, "runs", finished.config)["runs"]
    assert finished.result["run"] in [row["run"] for row in rows]
    assert main(["runs", "--store", str(finished.store)]) == 0
    assert finished.result["run"] in capsys.readouterr().out


def test_prefect_shows_the_run(finished: Finished) -> None:
    from prefect.client.orchestration import get_client

    run = flow_runs("tiny_project 4bit")[-1]
    assert run.state_name == "Completed"
    assert task_states(run, STEPS) == {"Completed": STEPS}
    with get_client(sync_client=True) as client:
        # By hand: the client's own call sends nulls, which newer servers' web frameworks refuse.
        query = {"artifacts": {"flow_run_id": {"any_": [str(run.id)]}}, "limit": 100}
        found = {item["key"]: item for item in client.request("POST", "/artifacts/filter", json=query).json()}
    assert found["allocation"]["type"] == "table"
    assert len(json.loads(found["allocation"]["data"])) == len(LAYERS)
    assert "output NMSE" in found["result"]["data"]
    progress = {key: float(item["data"]) for key, item in found.items() if item["type"] == "progress"}
    assert progress == dict.fromkeys(("capture", "candidates", "sensitivity", "round-4bit"), 100.0)
    assert "tiny_project" in found["sensitivity"]["description"]


# -- reuse ------------------------------------------------------------------------------------------------------


def test_second_run_computes_nothing(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished.store)
    result = prints_json(capsys, "compress", finished.config)
    assert contents(finished.store) == before
    assert result["steps"] == {"computed": 0, "reused": STEPS}
    assert result["seconds"] == {}, "reused steps took no time of this run"
    assert result["seconds_reused"] == finished.result["seconds"]
    same = set(result) - {"steps", "seconds", "seconds_reused", "wall_seconds"}
    assert {key: result[key] for key in same} == {key: finished.result[key] for key in same}
    assert task_states(flow_runs("tiny_project 4bit")[0], STEPS) == {"Cached": STEPS}


def test_dry_run_of_a_finished_run(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished.store)
    plan = prints_json(capsys, "compress", finished.config, "--dry-run")
    assert contents(finished.store) == before
    assert sum(row["compute"] for row in plan["steps"].values()) == 0
    assert sum(row["reused"] for row in plan["steps"].values()) == STEPS
    assert plan["expected"]["seconds"] == 0
    assert plan["smallest_bytes"] == finished.result["smallest_bytes"]


def test_the_default_preset_does_what_its_dry_run_says(
    tmp_path: Path, prefect_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"points": 3, "samples": 8, "sum_ranks": [2, 4]}
    rounding = {"iterations": 6, "tuning": 4, "batch_size": 4}
    path = write_project(tmp_path, preset="best", search=search, rounding=rounding)
    plan = prints_json(capsys, "compress", path, "--dry-run")
    result = prints_json(capsys, "compress", path)
    assert "tune" in plan["steps"]
    assert sum(row["compute"] for row in plan["steps"].values()) == result["steps"]["computed"]
    assert set(result["seconds"]) == set(steps.REGISTRY) - {
        "activations",
        "embeddings",
        "export",
        "joint",
        "table_costs",
        "width_costs",
    }
    assert result["bytes"] <= result["budget_bytes"]
    again = prints_json(capsys, "compress", path)
    assert again["steps"] == {"computed": 0, "reused": result["steps"]["computed"]}
    (alone,) = prints_json(capsys, "rebudget", path, "--budget", "5bit", "--allocate-only")["results"]
    assert alone["steps"]["computed"] == 1
    (found,) = prints_json(capsys, "rebudget", path, "--budget", "5bit")["results"]
    assert found["allocation"] == alone["allocation"]
    assert found["steps"]["reused"] >= SHARED_STEPS + 1  # the program's solution too


def test_nothing_is_removed_before_a_command_has_read_its_results(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is in use beyond the last step: the results are read, the pages made, the checkpoint copied."""
    refused: list[str] = []

    def asking(owner: Any, name: str) -> None:
        given = getattr(owner, name)

        def ask(*args: Any, **kwargs: Any) -> Any:
            with (
                pytest.raises(StoreError, match="may need any artifact"),
                garbage.alone(Store(f"file://{finished.store}"), "store gc"),
            ):
                pass
            refused.append(name)
            return given(*args, **kwargs)

        monkeypatch.setattr(owner, name, ask)

    asking(pipeline, "results_json")
    asking(pipeline, "_show_result")
    asking(commands, "_copy_checkpoints")
    prints_json(capsys, "compress", finished.config, "--output", tmp_path / "out")
    assert refused == ["results_json", "_show_result", "_copy_checkpoints"]
    with garbage.alone(Store(f"file://{finished.store}"), "store gc"):
        pass


def test_rebudget_and_allocate_only(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished.store)
    asked = ["--budget", "3bit", "--budget", "5bit"]
    alone = prints_json(capsys, "rebudget", finished.config, *asked, "--allocate-only")["results"]
    added = set(contents(finished.store)) - set(before)
    assert {name.split("/")[0] for name in added} == {"allocate"}
    for result in alone:
        assert result["steps"] == {"computed": 1, "reused": 14}
        assert (result["nmse"], result["metric"], result["checkpoint"]) == (None, None, None)
    found = prints_json(capsys, "rebudget", finished.config, *asked)
    for result, allocated in zip(found["results"], alone, strict=True):
        assert result["budget"] == allocated["budget"]
        assert result["allocation"] == allocated["allocation"]
        assert result["bytes"] <= result["budget_bytes"]
        assert result["steps"]["computed"] == STEPS - SHARED_STEPS - 1
    assert found["steps"]["computed"] == 2 * (STEPS - SHARED_STEPS - 1)
    page = prints_json(capsys, "report", found["results"][0]["run"], finished.config)["page"]
    html = Path(page.removeprefix("file://")).read_text()
    (line,) = re.findall(r"Computing took (.*?); what was reused had taken (.*?)\.<", html)
    account = found["results"][0]
    own = {step: seconds for step, seconds in account["seconds"].items() if step != "summary"}  # the page is its own
    assert line == (duration(sum(own.values())), duration(sum(account["seconds_reused"].values())))
    assert main(["rebudget", str(finished.config), *asked, "--allocate-only"]) == 0
    out = capsys.readouterr().out
    assert "3bit" in out
    assert "seconds by step" not in out, "all was reused"
    assert "(seconds when computed, before)" in " ".join(out.split())
    # What was there before is as it was.
    assert before.items() <= contents(finished.store).items()


def test_allocations_alone_are_listed_until_they_are_runs(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    (alone,) = prints_json(capsys, "rebudget", finished.config, "--budget", "4.5bit", "--allocate-only")["results"]
    listed = prints_json(capsys, "runs", finished.config)
    (row,) = [row for row in listed["allocations"] if row["budget"] == "4.5bit"]
    assert {name: row[name] for name in ("run", "model", "budget_bytes", "bytes", "predicted_cost")} == {
        name: alone[name] for name in ("run", "model", "budget_bytes", "bytes", "predicted_cost")
    }
    assert alone["run"] not in [run["run"] for run in listed["runs"]]
    assert main(["runs", str(finished.config)]) == 0
    assert "allocations alone" in capsys.readouterr().out
    line = fails(capsys, "report", alone["run"], finished.config)
    assert "allocation alone" in line
    assert "mlorq rebudget CONFIG --budget 4.5bit" in line
    (made,) = prints_json(capsys, "rebudget", finished.config, "--budget", "4.5bit")["results"]
    listed = prints_json(capsys, "runs", finished.config)
    assert made["run"] in [run["run"] for run in listed["runs"]]
    assert "4.5bit" not in [row["budget"] for row in listed["allocations"]]


def test_allocate_only_without_a_server_is_the_same(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    served = prints_json(capsys, "rebudget", finished.config, "--budget", "3.5bit", "--allocate-only")
    assert flow_runs("tiny_project 3.5bit")[0].state_name == "Completed"
    monkeypatch.delenv("PREFECT_API_URL")
    alone = prints_json(capsys, "rebudget", finished.config, "--budget", "3.5bit", "--allocate-only")
    assert served["results"][0]["allocation"] == alone["results"][0]["allocation"]
    assert alone["results"][0]["steps"] == {"computed": 0, "reused": 15}


def test_flows_run_by_themselves(finished: Finished) -> None:
    """As in a deployment: called with plain values, without a command around."""
    from flows.compress import compress_flow
    from flows.rebudget import rebudget_flow

    config = RunConfig.from_yaml(finished.config)
    values = config.model_dump(mode="json")
    found = compress_flow(values, config.folder)
    assert found["steps"] == {"computed": 0, "reused": STEPS}
    assert found["results"][0]["nmse"] == finished.result["nmse"]
    with pytest.raises(StoreError, match="run first: the compress flow"):
        rebudget_flow(values | {"seed": 7}, config.folder, ["3bit"], allocate_only=True)
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        compress_flow(values | {"budgte": "3bit"}, config.folder)
    assert flow_runs("refused: unknown key 'budgte'; did you mean 'budget'?")[0].state_name == "Failed"
    with pytest.raises(BudgetError, match="the smallest possible is") as caught:
        compress_flow(values, config.folder, ["0.1bit"])
    refused, *_ = flow_runs(failed_name("tiny_project 0.1bit", caught.value))
    assert str(caught.value) in refused.state.message
    assert "\n" not in refused.state.message


def test_several_budgets_and_outputs(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished.config.parent / "several"
    asked = ["--budget", "4bit", "--budget", "20%"]
    found = prints_json(capsys, "compress", finished.config, *asked, "--output", out)
    assert [result["budget"] for result in found["results"]] == ["4bit", "20%"]
    assert found["results"][0]["steps"] == {"computed": 0, "reused": STEPS}
    for result in found["results"]:
        assert result["output"] == str(out / result["budget"])
        assert prints_json(capsys, "inspect", result["output"])["file_bytes"] == result["file_bytes"]


def test_several_workers_make_the_same_bytes(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path, engine={"devices": ["cpu", "cpu", "cpu"], "threads": 1})
    result = prints_json(capsys, "compress", project)
    assert result["allocation"] == finished.result["allocation"]
    for name in ("model.safetensors", "mlorq.json"):
        ours = Path(result["checkpoint"].removeprefix("file://")) / name
        theirs = Path(finished.result["checkpoint"].removeprefix("file://")) / name
        assert ours.read_bytes() == theirs.read_bytes()


# -- faults -----------------------------------------------------------------------------------------------------


def break_step(monkeypatch: pytest.MonkeyPatch, name: str, layer: str, error: Exception, times: int = 99) -> list[int]:
    """Let a step fail for one layer, ``times`` times; gives a list that grows by one a try."""
    step = steps.REGISTRY[name]
    tries: list[int] = []

    def run(params: Any, inputs: Any, context: Any, progress: Any) -> dict[str, bytes]:
        if params.layer == layer:
            tries.append(1)
            if len(tries) <= times:
                raise error
        return step.run(params, inputs, context, progress)

    monkeypatch.setitem(steps.REGISTRY, name, replace(step, run=run))
    return tries


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_one_layer(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = f"4.{workers}bit"
    project = write_project(
        tmp_path, budget=budget, engine={"devices": ["cpu"] * workers, "threads": 1}, rounding={"method": "nearest"}
    )
    with monkeypatch.context() as patch:
        tries = break_step(patch, "sensitivity", "blocks.1.up", ModelError("layer 'blocks.1.up': holds NaN"))
        assert fails(capsys, "compress", project) == "layer 'blocks.1.up': holds NaN"
    assert len(tries) == 1
    assert flow_runs(f"tiny_project {budget}: sensitivity blocks.1.up failed")[0].state_name == "Failed"
    done = artifacts(tmp_path / "store", "sensitivity")
    assert artifacts(tmp_path / "store", "candidates") == 6
    assert 2 <= done <= 5  # two workers: what they were at is finished, and no more is started
    result = prints_json(capsys, "compress", project)
    assert result["steps"]["reused"] == 1 + 1 + 1 + 6 + done  # layers, baseline and activations; candidates


def test_a_fault_of_the_store_that_passes_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.executor.RETRY_SECONDS", (0, 0))
    project = write_project(tmp_path, budget="4.3bit", rounding={"method": "nearest"})
    gone = StoreError("cannot write artifact")
    gone.__cause__ = ConnectionResetError("the store hung up")
    tries = break_step(monkeypatch, "candidates", "head", gone, times=2)
    assert main(["compress", str(project)]) == 0
    out, err = capsys.readouterr()
    assert len(tries) == 3
    assert f"{STEPS} computed, 0 reused" in out
    assert "mlorq.load(" in out
    assert "a library that prints" in err
    assert "a library that prints" not in out


def test_what_is_transient() -> None:
    def caused(error: OSError) -> StoreError:
        found = StoreError("cannot read")
        found.__cause__ = error
        return found

    assert is_transient(caused(TimeoutError()))
    assert is_transient(ConnectionResetError())
    assert not is_transient(caused(OSError(28, "No space left on device")))
    assert not is_transient(caused(PermissionError()))
    assert not is_transient(caused(FileNotFoundError()))
    assert not is_transient(StoreError("damaged"))
    assert not is_transient(ModelError("NaN"))
    assert not is_transient(None)


def test_mistakes_are_found_before_the_run(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path)
    smallest = finished.result["smallest_bytes"]
    assert f"the smallest possible is {byte_count(smallest)}" in fails(capsys, "compress", project, "--budget", "1bit")
    assert "budget 100B is too small" in fails(capsys, "compress", project, "--budget", "100B")
    assert not contents(tmp_path / "store")
    # Also where the layers are known already, and before anything is computed.
    config = RunConfig.from_yaml(project)
    session = open_session(config)
    execute(layers.spec(session), session.worker)
    before = contents(tmp_path / "store")
    assert f"the smallest possible is {byte_count(smallest)}" in fails(capsys, "compress", project, "--budget", "1bit")
    assert contents(tmp_path / "store") == before
    (tmp_path / "file").write_text("")
    line = fails(capsys, "compress", project, "--set", f"store=file://{tmp_path}/file/store")
    assert "cannot be written" in line
    assert "cannot be written" in fails(capsys, "compress", project, "--output", tmp_path / "file" / "out")


def test_a_damaged_artifact_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = write_project(tmp_path, rounding={"method": "nearest"}, budget="4.4bit")
    prints_json(capsys, "compress", project)
    (damaged,) = (tmp_path / "store").glob("capture/*/reference.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    line = fails(capsys, "compress", project)
    assert str(damaged.parent) in line
    assert "is damaged: reference.parquet" in line


def test_workers_have_models_of_their_own_and_hits_load_none(finished: Finished) -> None:
    config = RunConfig.from_yaml(finished.config)
    session = open_session(config)
    executor = PrefectExecutor(session, Observers([]), ["cpu", "cpu"])
    first, second = (runner.worker for runner in executor._runners)
    assert first is session.worker
    assert "model" not in vars(second.context._sources)  # loaded when a step first needs it
    ours, theirs = (worker.context.model(session.model_ref).module for worker in (second, first))
    assert ours is not theirs
    assert theirs is session.model.module
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other)


# -- interruptions ----------------------------------------------------------------------------------------------


def start(project: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "compress", str(project), "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        # Background jobs of a shell are started with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(store: Path, step: str, count: int, process: subprocess.Popen[str]) -> None:
    """Until a store has so many artifacts of a step."""
    deadline = time.monotonic() + 240
    while artifacts(store, step) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


HELD = """

def held(model):
    import pathlib, time
    here = pathlib.Path(__file__).parent
    rounding = (here / "store" / "round").exists()  # if not, the float model is evaluated
    while rounding and (here / "held").exists():
        time.sleep(0.02)
    return evaluate(model)
"""


def write_held_project(folder: Path, budget: str) -> tuple[Path, Path]:
    """A configuration whose evaluation waits while a file exists, so that no run ends too early to be stopped.

    Returns:
        The configuration's path, and that of the file.
    """
    data = {
        "calibration": {"source": "custom", "factory": "tiny_project:batches"},
        "evaluation": {"source": "custom", "factory": "tiny_project:held"},
    }
    rounding = {"method": "lra", "iterations": 1000, "stop_loss": 0}
    project = write_project(folder, budget=budget, rounding=rounding, data=data)
    with (folder / "tiny_project.py").open("a") as module:
        module.write(HELD)
    hold = folder / "held"
    hold.touch()
    return project, hold


def test_ctrl_c_and_the_same_command_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefect_server: str
) -> None:
    project, hold = write_held_project(tmp_path, "4.75bit")
    process = start(project, {"PREFECT_API_URL": prefect_server})
    wait_for(tmp_path / "store", "round", 2, process)
    process.send_signal(signal.SIGINT)
    hold.unlink()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "mlorq: interrupted; run the same command again to resume"
    assert "Traceback" not in err
    assert flow_runs("tiny_project 4.75bit")[0].state_name == "Crashed"
    before = contents(tmp_path / "store")
    done = steps_in(before)
    assert done < STEPS
    result = prints_json(capsys, "compress", project)
    assert before.items() <= contents(tmp_path / "store").items()
    assert result["steps"] == {"computed": STEPS - done, "reused": done}


@pytest.mark.long
def test_kill_and_the_same_command_again_with_an_embedded_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, hold = write_held_project(tmp_path, "4.6bit")
    # No server is configured here: the process brings its own, on a database of its own.
    process = start(project, {"PREFECT_HOME": str(tmp_path / "prefect")})
    wait_for(tmp_path / "store", "round", 2, process)
    servers = children(process.pid)
    assert len(servers) == 1
    process.kill()
    process.communicate(timeout=60)
    hold.unlink()
    before = contents(tmp_path / "store")
    done = steps_in(before)
    assert done < STEPS
    result = prints_json(capsys, "compress", project)
    assert before.items() <= contents(tmp_path / "store").items()
    assert result["steps"] == {"computed": STEPS - done, "reused": done}
    # The embedded server has seen that its parent is gone.
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in servers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def is_running(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip()) and not found.stdout.strip().startswith("Z")


def test_the_store_is_all_that_counts(finished: Finished) -> None:
    """Every artifact of the finished run is whole."""
    store = Store(f"file://{finished.store}")
    for step in steps.REGISTRY:
        for ref in store.refs(step):
            for name in (store.manifest(ref) or {})["files"]:
                store.read_bytes(ref, name)
