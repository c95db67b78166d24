"""The command line without Prefect: arguments, mistakes, and the commands that only read."""

from __future__ import annotations

import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.exceptions import TerminationSignal

from flows.cli import main
from flows.dry_run import smallest_layer
from flows.run import known_layers, open_session
from flows.template import template
from mlorq import memory
from mlorq.config.run import ActivationsConfig, EmbeddingsConfig, RunConfig
from mlorq.config.sections import rounding_section, search_section
from mlorq.models import FAMILIES
from mlorq.numbers import byte_count
from tests.layers import search_config

FACTORY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))


def build(width=16):
    print("a library that prints")
    torch.manual_seed(0)
    return Net(width)


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, 8, generator=generator) for _ in range(4)]


def evaluate(model):
    return {"mean": float(torch.cat([model(batch) for batch in batches(2)]).mean())}
"""
LAYERS = ["stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def write_project(folder: Path, **changes: Any) -> Path:
    """A configuration of a model of two small blocks, beside the module that builds it; gives its path."""
    (folder / "tiny_project.py").write_text(FACTORY)
    values: dict[str, Any] = {
        "model": {"family": "custom", "factory": "tiny_project:build"},
        "data": {
            "calibration": {"source": "custom", "factory": "tiny_project:batches"},
            "evaluation": {"source": "custom", "factory": "tiny_project:evaluate"},
        },
        "budget": "4bit",
        "preset": "quick",
        "search": {"points": 3},
        "rounding": {"method": "lra", "iterations": 20},
        "store": "file://./store",
        "engine": {"devices": "cpu", "threads": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must fail as a user's mistake; gives its one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("mlorq: error: ")]
    assert len(errors) == 1
    assert "Traceback" not in err
    return errors[0].removeprefix("mlorq: error: ")


def prints_json(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    """Run a command with ``--json``; gives the one object that it prints."""
    capsys.readouterr()
    assert main([*(str(argument) for argument in argv), "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


# -- arguments --------------------------------------------------------------------------------------------------


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("init", "compress", "rebudget", "evaluate", "inspect", "runs", "models"):
        assert re.search(rf"^\s+{command}\s", text, re.MULTILINE)
        assert main([command, "--help"]) == 0
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    "argv",
    [[], ["squeeze"], ["compress"], ["compress", "x.yaml", "--fast"], ["compress", "x.yaml", "--set", "no_value"]],
    ids=" ".join,
)
def test_wrong_arguments_are_status_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage:" in capsys.readouterr().err


def test_set_takes_yaml_values(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "search.bits=[3, 4]", "--set", "search.factor_bits=[]", "--budget", "8bit"]
    plan = prints_json(capsys, "compress", project, "--dry-run", *settings)
    search = search_config(bits=[3, 4], factor_bits=[])
    assert plan["layers"][0]["smallest_bytes"] == 16 * (3 * 8 // 8 + 3)
    layers = known_layers(open_session(RunConfig.from_yaml(project))).layers
    assert plan["smallest_bytes"] == sum(smallest_layer(layer, search).bytes for layer in layers)


# -- mistakes ---------------------------------------------------------------------------------------------------


def test_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml does not exist" in fails(capsys, "compress", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("search.smaples=3", "did you mean 'samples'"),
        ("search.rounds=0", "search.rounds: removed; "),
        ("preset=rapid", "preset: "),
        ("rounding.method=adaround", "rounding.method"),
        ("search.bits=[1]", "search.bits"),
        ("engine.devices=cuda:77", "engine.devices: 'cuda:77' does not exist"),
        ("store=nonsense://x", "nonsense"),
        ("model.factory=tiny_project:nothing", "has no function 'nothing'"),
        ("data.calibration.factory=nowhere:batches", "there is no module 'nowhere'"),
        ("data.evaluation.factory=tiny_project:nothing", "has no function 'nothing'"),
        ("search.exclude=['*']", "no compressible layers"),
        ("budget=3 apples", "3 apples"),
        ("budget=[4bit, 0bit]", "0bit"),
        ("search.bits=[", "not YAML"),
    ],
)
@pytest.mark.parametrize("command", ["compress --dry-run", "rebudget --allocate-only"])
def test_mistakes_are_one_line(
    project: Path, setting: str, said: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, option = command.split()
    if name == "rebudget" and ("evaluation" in setting or "exclude" in setting):
        pytest.skip("allocating alone looks at neither")
    assert said in fails(capsys, name, project, option, "--set", setting)
    assert not (project.parent / "store").exists()


def test_allocating_alone_computes_nothing_else(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "rebudget", project, "--budget", "3bit", "--allocate-only", "--set", "search.points=2")
    assert "step 'layers'" in line
    assert f"mlorq compress {project} --set search.points=2" in line
    assert not (project.parent / "store").exists()


def test_checkpoint_that_is_not_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing" in fails(capsys, "inspect", project.parent / "nothing")
    assert "nothing" in fails(capsys, "evaluate", project.parent / "nothing", project)


# -- dry run ----------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = prints_json(capsys, "compress", project, "--dry-run", "--budget", "4bit", "--budget", "10%")
    assert not (project.parent / "store").exists()
    assert [row["layer"] for row in plan["layers"]] == LAYERS
    assert plan["smallest_file_bytes"] == plan["smallest_bytes"] + plan["rest_bytes"]
    assert plan["params"] == sum(row["params"] for row in plan["layers"])
    assert [row["budget_bytes"] for row in plan["budgets"]] == [plan["params"] // 2, 4 * plan["params"] // 10]
    counts = {step: row["compute"] for step, row in plan["steps"].items()}
    once = {"layers", "capture", "baseline"}
    by_budget = {"allocate", "compressed", "evaluate", "calibration", "summary"}
    expected = {"candidates": 6, "sensitivity": 6, "round": 12} | dict.fromkeys(once, 1) | dict.fromkeys(by_budget, 2)
    assert counts == expected
    assert not any(row["reused"] for row in plan["steps"].values())
    assert plan["expected"]["seconds"] > 0
    assert plan["expected"]["memory_bytes"] > 0


def test_dry_run_counts_the_exports_of_every_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = write_project(tmp_path, export=[{"to": "dense"}, {"to": "dense", "dtype": "float16"}])
    plan = prints_json(capsys, "compress", project, "--dry-run", "--budget", "4bit", "--budget", "10%")
    assert plan["steps"]["export"]["compute"] == 4
    assert plan["steps"]["export"]["seconds"] > 0
    assert list(plan["steps"])[-2:] == ["export", "summary"]


def test_dry_run_shows_the_plan_of_an_impossible_budget_and_fails(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(project), "--dry-run", "--budget", "0.5bit", "--json"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert [row["feasible"] for row in plan["budgets"]] == [False]
    assert f"the smallest possible is {byte_count(plan['smallest_bytes'])}" in err


def test_dry_run_for_people(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(project), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(layer in out for layer in LAYERS)
    assert "smallest possible" in out
    assert "estimate" in out
    assert "a library that prints" not in out


def test_a_dry_run_names_the_layers_in_blocks(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = ("--dry-run", "--set", "search.metric=moments")
    whole = prints_json(capsys, "compress", project, *moments)
    assert whole["blocks"] == []
    monkeypatch.setattr(memory, "ONE_BLOCK", 16)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 16)
    plan = prints_json(capsys, "compress", project, *moments)
    down = [f"blocks.{index}.down" for index in range(2)]
    assert plan["blocks"] == [{"layer": layer, "in_features": 32, "width": 16} for layer in down]
    assert prints_json(capsys, "compress", project, "--dry-run")["blocks"] == []
    assert main(["compress", str(project), *moments]) == 0
    assert f"in blocks: {down[0]} (correlations between 2 blocks of 16 inputs are left out)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "flow", "estimate"),
    [
        ({}, "cuda:0", "cuda:0"),
        ({"steps": "subprocess"}, "cpu", "cuda:0"),
        ({"steps": "docker"}, "cpu", "cuda:0"),
        ({"devices": "cpu", "steps": "subprocess"}, "cpu", "cpu"),
        ({"runner": "dask"}, "cpu", "cpu"),  # its workers are wherever they are
    ],
)
def test_a_dry_run_estimates_on_the_device_that_steps_will_have(
    engine: dict[str, Any], flow: str, estimate: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = RunConfig.from_yaml(project, {"engine": engine})
    assert str(open_session(config).device) == flow
    assert str(open_session(config, to_estimate=True).device) == estimate


# -- init -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.names())
def test_template_is_a_valid_configuration(family: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(template(family))
    config = RunConfig.from_yaml(path)
    assert config.model.family == family
    # What is commented out has the values that hold: written out, nothing changes.
    written_out = re.sub(r"^(\s*)# (\w+: .*)$", r"\1\2", template(family), flags=re.MULTILINE)
    lines = [line for line in written_out.splitlines() if not line.lstrip().startswith("#")]
    path.write_text("\n".join(lines))
    assert RunConfig.from_yaml(path) == config


def test_template_has_every_key() -> None:
    text = template()
    sections = (search_section(), rounding_section(), RunConfig)
    for name in (name for section in sections for name in section.model_fields):
        if name != "folder":
            assert re.search(rf"^\s*(# )?{name}:", text, re.MULTILINE), name
    for name in (*ActivationsConfig.model_fields, *EmbeddingsConfig.model_fields):
        assert re.search(rf"^#   {name}:", text, re.MULTILINE), name


def test_init_writes_and_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new.yaml"
    assert main(["init", str(path), "--model", "transformers:./mine"]) == 0
    assert RunConfig.from_yaml(path).model.name == "./mine"
    text = path.read_text()
    assert "exists already" in fails(capsys, "init", path)
    assert path.read_text() == text
    assert main(["init"]) == 0
    assert capsys.readouterr().out == template()
    assert "the family is one of" in fails(capsys, "init", "--model", "tensorflow")


# -- lists ------------------------------------------------------------------------------------------------------


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    rows = prints_json(capsys, "models")["models"]
    assert {"family", "model", "task", "tested", "measured", "command"} == set(rows[0])
    assert main(["models"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(row["model"][:8] in out and row["command"].split()[-1] in out for row in rows)
    assert "top-1 0.8114" in out


def test_runs_of_an_empty_store(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prints_json(capsys, "runs", project)["runs"] == []
    assert prints_json(capsys, "runs", "--store", project.parent / "elsewhere")["runs"] == []
    assert "--store" in fails(capsys, "runs")


def test_a_dry_run_with_embeddings_and_layers_of_their_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ("--set", "embeddings={bits: 8}", "--set", "search.layers={head: {bits: [8], forms: [Q]}}")
    plan = prints_json(capsys, "compress", project, "--dry-run", *changed)
    assert plan["steps"]["embeddings"]["compute"] == 1
    assert plan["embeddings"] == {"bits": 8, "tables": [], "skipped": []}
    smallest = {row["layer"]: row["smallest_bytes"] for row in plan["layers"]}
    assert smallest["head"] == 4 * (16 + 2 + 1)
    assert sum(plan["rest"].values()) < plan["rest_bytes"]
    wrong = fails(capsys, "compress", project, "--dry-run", "--set", "search.layers={haed: {bits: [8]}}")
    assert "'haed'" in wrong
    assert "'head'" in wrong


def test_an_interrupt_that_ends_in_an_error_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where it hits Prefect between two states of a task."""

    def interrupted(arguments: list[str], event: threading.Event) -> int:
        event.set()
        raise ValueError("Task run is not set")

    def terminated(arguments: list[str], event: threading.Event) -> int:
        try:
            raise TerminationSignal(
                signal=signal.SIGTERM
            )  # by the handler that Prefect installs for the time of a flow
        except TerminationSignal:
            raise ValueError("Task run is not set")  # noqa: B904

    def defect(arguments: list[str], event: threading.Event) -> int:
        raise ValueError("a defect")

    for run, status in ((interrupted, 130), (terminated, 143)):
        monkeypatch.setattr("flows.cli._run", run)
        assert main(["models"]) == status
        assert "run the same command again to resume" in capsys.readouterr().err
    monkeypatch.setattr("flows.cli._run", defect)
    with pytest.raises(ValueError, match="a defect"):
        main(["models"])
