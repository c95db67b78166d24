"""The sweep: many budgets on one search, the curve, and `mlorq sweep`."""

from __future__ import annotations

import json
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.events import REBUDGET_REQUESTED, SEARCH_FINISHED, SearchWatch
from flows.goal import RUN_FINISHED
from flows.page import known_made, made_of
from flows.run import prepare
from flows.sweep import CURVE, LADDER, PAGE, POINTS, keep_curve, ladder, sweep_flow
from mlorq.artifacts.store import Store
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError, StoreError
from mlorq.numbers import byte_count
from steps.base import Outcome, StepSpec
from tests.flows.test_cli import fails, prints_json, write_project
from tests.flows.test_flows import STEPS, contents, flow_runs

BUDGETS = ("--budget", "3bit", "--budget", "5bit")


class Swept:
    """A project with one sweep, made once for the tests that only read it."""

    def __init__(self, folder: Path) -> None:
        self.config = write_project(folder, rounding={"method": "nearest"})
        self.store = folder / "store"
        self.output = folder / "curve"
        self.result: dict[str, Any] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Swept:
    project = Swept(tmp_path_factory.mktemp("swept"))
    output = project.config.parent / "result.json"
    with pytest.MonkeyPatch.context() as patch, output.open("w") as file:
        patch.setattr("prefect.events.emit_event", lambda event, **about: project.events.append((event, about)))
        patch.setattr(sys, "stdout", file)
        assert main(["sweep", str(project.config), *BUDGETS, "--output", str(project.output), "--json"]) == 0
    project.result = json.loads(output.read_text())
    return project


def test_one_search_and_every_budget(swept: Swept) -> None:
    results = swept.result["results"]
    assert [result["budget"] for result in results] == ["3bit", "5bit"]
    assert results[0]["bytes"] < results[1]["bytes"]
    shared = 1 + 1 + 6 + 6 + 1  # that both budgets stand on
    assert swept.result["steps"] == {"computed": 2 * STEPS - shared, "reused": 0}
    assert flow_runs("tiny_project 3bit 5bit")[0].state_name == "Completed"


def test_the_curve(swept: Swept) -> None:
    curve = swept.result["curve"]
    for kind, name in (("picture", CURVE), ("page", PAGE), ("points", POINTS)):
        stored = Path(curve[kind].removeprefix("file://"))
        assert stored.name == name
        assert stored.read_bytes() == (swept.output / name).read_bytes()
    assert (swept.output / CURVE).read_bytes().startswith(b"\x89PNG")
    points = json.loads((swept.output / POINTS).read_bytes())["points"]
    assert [point["budget"] for point in points] == ["3bit", "5bit"]
    assert {"bytes", "nmse", "mean", "mean_float", "checkpoint"} <= set(points[0])
    assert (swept.output / PAGE).read_text().count("<svg") == 3  # metric, output NMSE, predictions
    # It is an artifact as any other: whole, by its manifest.
    store = Store(f"file://{swept.store}")
    (ref,) = store.refs("sweep")
    assert store.read_bytes(ref, POINTS) == (swept.output / POINTS).read_bytes()


def test_every_run_has_its_page(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(f"file://{swept.store}")
    assert len(list(store.refs("report"))) == 2
    run = swept.result["results"][1]["run"]
    page = Path(prints_json(capsys, "report", run, swept.config)["page"].removeprefix("file://")).read_text()
    assert "mlorq compress run.yaml --budget 5bit" in page
    assert "factory: tiny_project:build" in page  # the whole configuration
    assert f"Python {platform.python_version()}" in page
    shared = 1 + 1 + 6 + 6 + 1  # computed for the first budget
    assert f"{shared} of {STEPS - 1} steps were reused" in page  # all but the summary itself
    # Another page, of the same facts, and without them where no flow has made the run.
    ref = next(ref for ref in store.refs("summary") if store.read_json(ref, "run.json")["run"] == run)
    assert known_made(store, ref)["reused"]["candidates"] == 6
    assert made_of(store, ref, store.read_json(ref, "run.json"), {}).command == ""


def test_a_store_that_cannot_take_a_page_fails_nothing(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.pipeline.get_run_logger", lambda: logging.getLogger("flows.pipeline"))
    monkeypatch.setattr("flows.pipeline.keep_page", lambda *arguments: (_ for _ in ()).throw(StoreError("read-only")))
    assert sweep_flow("run.yaml", str(swept.config.parent), ["5bit"])["results"][0]["budget"] == "5bit"
    assert "no page of tiny_project-5bit" in caplog.text


def test_a_sweep_tells_that_it_has_finished_and_nothing_that_starts_runs(swept: Swept) -> None:
    assert [name for name, _ in swept.events] == [RUN_FINISHED]


def test_second_sweep_computes_nothing(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(swept.store)
    assert main(["sweep", str(swept.config), *BUDGETS]) == 0
    out = capsys.readouterr().out
    assert contents(swept.store) == before
    assert swept.result["results"][0]["run"] in out
    assert swept.result["curve"]["picture"] in out


def test_impossible_budgets_are_named_before_any_work(
    swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path)
    line = fails(capsys, "sweep", project, "--budget", "3bit", "--budget", "1bit", "--budget", "0.5bit")
    assert "budgets are too small: 1bit, 0.5bit;" in line
    assert f"the smallest possible is {byte_count(swept.result['results'][0]['smallest_bytes'])}" in line
    assert "3 apples" in fails(capsys, "sweep", project, "--budget", "3 apples")
    assert not contents(tmp_path / "store")


def test_default_budgets(tmp_path: Path) -> None:
    session = prepare(RunConfig.from_yaml(write_project(tmp_path, search={"bits": [2], "factor_bits": []})), [])
    # Layers as small as these have a bit and more of scales a weight.
    assert ladder(session, None) == (parse_budgets(["4bit", "6bit"]), parse_budgets(["2bit", "2.5bit", "3bit"]))
    assert ladder(session, parse_budgets(["6bit", "4bit", "6bit"])) == (parse_budgets(["6bit", "4bit"]), [])
    with pytest.raises(BudgetError, match="none is given"):
        ladder(session, [])
    session = prepare(RunConfig.from_yaml(write_project(tmp_path, search={"bits": [8], "factor_bits": []})), [])
    with pytest.raises(BudgetError, match=", ".join(LADDER)):
        ladder(session, None)


def test_the_flow_by_itself(swept: Swept) -> None:
    """As in a deployment: without a command around, with a file that is seen from where the run works."""
    found = sweep_flow("run.yaml", str(swept.config.parent), ["3bit", "5bit"])
    assert found["steps"]["computed"] == 0
    assert found["curve"] == swept.result["curve"]
    values = RunConfig.from_yaml(swept.config).model_dump(mode="json")
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        sweep_flow(values | {"budgte": "3bit"}, str(swept.config.parent))


def test_a_store_that_cannot_take_the_curve_fails_nothing(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise StoreError("read-only")

    session = prepare(RunConfig.from_yaml(swept.config), [])
    monkeypatch.setattr(Store, "write", refuse)
    monkeypatch.setattr("flows.sweep.get_run_logger", lambda: logging.getLogger("flows.sweep"))
    assert keep_curve(session, swept.result["results"][:1]) is None
    assert "read-only" in caplog.text


# -- the event ----------------------------------------------------------------------------------------------------


def steps_of(watch: SearchWatch, *, reused: bool) -> None:
    """Tell a watch about a search of one layer."""
    for step in ("capture", "candidates", "sensitivity"):
        watch.phase(step, 1)
        spec = StepSpec(step, 1, {})
        watch.step_started(spec)
        watch.step_finished(spec, Outcome(spec.ref, reused, 0.1))
    watch.phase("allocate", 1)
    watch.phase("round", 1)
    watch.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Events that were emitted."""
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("prefect.events.emit_event", lambda event, **about: events.append((event, about)))
    return events


def test_a_search_that_was_computed_is_told_once(tmp_path: Path, told: list[tuple[str, dict[str, Any]]]) -> None:
    config = RunConfig.from_yaml(write_project(tmp_path))
    steps_of(SearchWatch(config, "tiny", ["4bit"]), reused=False)
    ((event, about),) = told
    assert event == SEARCH_FINISHED
    assert about["resource"]["prefect.resource.id"].startswith("mlorq.search.")
    payload = json.loads(json.dumps(about["payload"]))
    # It is all that a run needs.
    assert RunConfig.from_mapping(payload["config"], payload["folder"]) == config
    assert payload["budgets"] == ["4bit"]
    assert event != REBUDGET_REQUESTED


def test_a_search_that_was_reused_is_not_told(tmp_path: Path, told: list[tuple[str, dict[str, Any]]]) -> None:
    steps_of(SearchWatch(RunConfig.from_yaml(write_project(tmp_path)), "tiny", ["4bit"]), reused=True)
    assert told == []


def test_an_event_that_cannot_be_sent_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(event: str, **about: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("prefect.events.emit_event", refuse)
    steps_of(SearchWatch(RunConfig.from_yaml(write_project(tmp_path)), "tiny", ["4bit"]), reused=False)
    assert "no server" in caplog.text


# -- the smallest model that keeps a metric -------------------------------------------------------------------------


def test_the_smallest_model_that_keeps_a_metric(
    prefect_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One candidate per layer: one budget to try.
    project = write_project(tmp_path, rounding={"method": "nearest"}, search={"bits": [4], "factor_bits": []})
    found = prints_json(capsys, "sweep", project, "--max-drop", "100", "--output", tmp_path / "curve")
    (tried,), smallest = found["smallest"]["tried"], found["smallest"]
    assert smallest["metric"] == "mean"
    assert smallest["found"] == {name: tried[name] for name in ("run", "budget", "bytes", "value")}
    assert smallest["bound"] == smallest["float"] - 100
    assert [result["run"] for result in found["results"]] == [tried["run"]]
    assert json.loads((tmp_path / "curve" / POINTS).read_bytes())["smallest"] == smallest
    assert "The smallest model with mean of at least -100.0" in (tmp_path / "curve" / PAGE).read_text()
    assert flow_runs("tiny_project max_drop 100")[0].state_name == "Completed"
    # The same again, by the flow alone: nothing is computed. Then one that no size keeps.
    again = sweep_flow("run.yaml", str(tmp_path), max_drop="100")
    assert again["steps"]["computed"] == 0
    assert again["smallest"] == smallest
    assert again["curve"] == found["curve"]
    line = fails(capsys, "sweep", project, "--max-drop", "0")
    assert "no budget up to" in line
    assert "gives mean of at least" in line


def test_what_cannot_be_kept_is_said_before_the_search(
    prefect_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = write_project(tmp_path)
    assert "leave out --budget" in fails(capsys, "sweep", project, "--max-drop", "1%", "--budget", "3bit")
    assert "max_drop, min_metric" in fails(capsys, "sweep", project, "--max-drop", "1%", "--min-metric", "1")
    assert not contents(tmp_path / "store")
    line = fails(capsys, "sweep", project, "--max-drop", "1%", "--metric", "acc")
    assert line == "metric 'acc' is unknown; the evaluation data has: mean"
    assert "mean of at least 7 is asked for, but the float model has 0.00" in fails(
        capsys, "sweep", project, "--min-metric", "7"
    )
    steps = {path.parent.parent.name for path in (tmp_path / "store").glob("*/*/manifest.json")}
    assert steps == {"layers", "baseline"}


@pytest.mark.long
def test_an_interrupted_bisection_continues(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    write_project(tmp_path / "whole", rounding={"method": "nearest"})
    write_project(tmp_path / "parts", rounding={"method": "nearest"})
    whole = sweep_flow("run.yaml", str(tmp_path / "whole"), max_drop="0.05")
    assert len(whole["smallest"]["tried"]) > 3
    from steps.smallest import Bisection

    tried = Bisection.evaluated

    def stop(self: Bisection, *arguments: Any) -> None:
        tried(self, *arguments)
        if len(self.tried) == 2:
            raise StoreError("interrupted")

    monkeypatch.setattr(Bisection, "evaluated", stop)
    with pytest.raises(StoreError, match="interrupted"):
        sweep_flow("run.yaml", str(tmp_path / "parts"), max_drop="0.05")
    monkeypatch.undo()
    again = sweep_flow("run.yaml", str(tmp_path / "parts"), max_drop="0.05")
    assert again["smallest"] == whole["smallest"]
    assert again["steps"]["reused"] > 15
    assert again["steps"]["computed"] < whole["steps"]["computed"]
