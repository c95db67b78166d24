"""The metric that a configuration asks for: what results, warnings and events say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prefect.events
import pytest

from flows.goal import GOAL_MISSED, RUN_FINISHED, announce, goal_json
from mlorq.config.run import RunConfig
from tests.flows.test_cli import fails, prints_json, write_project

METRICS = {"float": {"accuracy": 0.8, "perplexity": 10.0}, "compressed": {"accuracy": 0.79, "perplexity": 11.0}}
RESULT: dict[str, Any] = {"run": "net-3bit", "bytes": 100, "metric": {"name": "accuracy"}, "metrics": METRICS}


def config_with(tmp_path: Path, **goal: Any) -> RunConfig:
    return RunConfig.from_yaml(write_project(tmp_path, goal=goal))


@pytest.mark.parametrize(
    ("goal", "kept", "said"),
    [
        ({"max_drop": "2%"}, True, "accuracy 0.7900, asked for: at least 0.7840"),
        ({"max_drop": "1%"}, False, "at least 0.792"),
        ({"max_drop": 0.02}, True, "at least 0.78"),
        ({"min_metric": 0.79}, True, "at least 0.79"),
        ({"max_drop": "5%", "metric": "perplexity"}, False, "perplexity 11.00, asked for: at most 10.50"),
        ({"max_metric": 12, "metric": "perplexity"}, True, "at most 12"),
        ({"min_metric": 0.9}, False, "the float model has 0.8"),
        ({"max_drop": "1%", "metric": "f1"}, False, "metric 'f1' is unknown"),
    ],
)
def test_whether_a_model_keeps_it(tmp_path: Path, goal: dict[str, Any], kept: bool, said: str) -> None:
    found = goal_json(config_with(tmp_path, **goal), RESULT)
    assert found is not None
    assert found["kept"] is kept
    assert said in found["about"]


def test_without_a_goal_nothing_is_said(tmp_path: Path) -> None:
    assert goal_json(RunConfig.from_yaml(write_project(tmp_path)), RESULT) is None
    assert goal_json(config_with(tmp_path, max_drop="1%"), {"run": "of allocate-only"}) is None


@pytest.mark.parametrize(("missed", "event"), [(False, RUN_FINISHED), (True, GOAL_MISSED)])
def test_one_event_a_run(missed: bool, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(prefect.events, "emit_event", lambda name, **about: sent.append((name, about)))
    results = [{**RESULT, "metric": None}, {**RESULT, "metric": None, "goal": {"kept": not missed, "about": "why"}}]
    announce("net", results)
    ((name, about),) = sent
    assert name == event
    first, second = about["payload"]["text"].splitlines()
    assert "goal" not in first
    assert second.endswith(f"({'goal missed' if missed else 'goal kept'}: why)")


def test_an_event_that_is_not_taken_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefect.events, "emit_event", lambda *values, **about: 1 / 0)
    announce("net", [{**RESULT, "metric": None}])
    assert "was not sent" in caplog.text


def test_a_run_with_a_goal(prefect_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "goal: give one of" in fails(capsys, "compress", write_project(tmp_path, goal={}))
    assert "goal: max_drop: expected" in fails(capsys, "compress", write_project(tmp_path, goal={"max_drop": "much"}))
    found = prints_json(capsys, "compress", write_project(tmp_path, goal={"max_metric": 1e-9}))
    assert found["goal"]["kept"] is False
    assert found["goal"]["asked"] == "max_metric 1e-09"
