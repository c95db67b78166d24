"""Runs in experiment trackers: MLflow in a local folder, a stand-in for Weights & Biases, and trackers that fail."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flows import tracking
from flows.compress import compress_flow
from flows.permissions import check_permitted
from flows.tracking import Tracked, check, metrics_of, mlflow_place, parameters, to_mlflow, to_wandb
from mlorq.config.run import RunConfig
from mlorq.config.tracking import MlflowConfig, WandbConfig
from mlorq.errors import ConfigError
from mlorq.extras import install_command
from tests.flows.test_cli import fails, write_project

REPORT = b"<html>page</html>"


def a_run(folder: Path, name: str = "net-3bit-1a2b3c4d") -> Tracked:
    """A finished run of two layers, with more parameters than fit in one request."""
    rows = [{"layer": f"layer{index}", "form": "Q", "bits": 3, "rank": None, "bytes": 96} for index in range(2)]
    values = {f"section.key{index}": str(index) for index in range(130)}
    files = {"report.html": REPORT, "run.json": b"{}", "allocation.json": json.dumps(rows).encode()}
    checkpoint = {"model.safetensors": b"codes", "preparation/tokenizer.json": b"{}"}
    return Tracked(name, str(folder), values, {"nmse": 3.5e-5, "bytes": 192.0}, rows, files, lambda: checkpoint)


# -- what is logged -------------------------------------------------------------------------------------------------


def test_parameters_are_the_configuration_by_dotted_key() -> None:
    given = {"search": {"bits": [2, 3], "layers": {"blocks.*": {"forms": ["Q"]}}}, "seed": 0, "target": None, "a": "b"}
    found = dict(parameters(given))
    assert found == {"search.bits": "[2, 3]", "search.layers.blocks._.forms": '["Q"]', "seed": "0", "a": "b"}
    assert len(dict(parameters({"a": "x" * 9999}))["a"]) == 500


def test_metrics_are_the_finite_numbers_of_a_result() -> None:
    result = {
        "bytes": 100, "float_bytes": 1000, "file_bytes": None, "nmse": 0.1, "predicted_cost": float("inf"),
        "metrics": {"float": {"accuracy": 0.9}, "compressed": {"accuracy": 0.8, "loss": float("nan")}},
        "seconds": {"round": 2.5},
    }  # fmt: skip
    assert metrics_of(result) == {
        "bytes": 100.0, "float_bytes": 1000.0, "nmse": 0.1, "times_smaller": 10.0, "float.accuracy": 0.9,
        "compressed.accuracy": 0.8, "seconds.round": 2.5,
    }  # fmt: skip


# -- the configuration ----------------------------------------------------------------------------------------------


def test_wrong_settings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = write_project(tmp_path, tracking={"mlfow": {}})
    assert "did you mean 'mlflow'" in fails(capsys, "compress", project)
    project = write_project(tmp_path, tracking={"mlflow": {"uri": "ftp://server"}})
    assert "tracking.mlflow.uri: expected a folder, or a URI" in fails(capsys, "compress", project)
    project = write_project(tmp_path, tracking={"mlflow": {"uri": "https://me:secret@server"}})
    assert "holds a secret" in fails(capsys, "compress", project)


def test_a_missing_package_is_said_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_is_installed", lambda name: False)
    project = write_project(tmp_path, tracking={"mlflow": {}})
    line = fails(capsys, "compress", project)
    assert line == f"tracking.mlflow: the package mlflow is not installed: {install_command('mlflow')}"
    assert not (tmp_path / "store").exists()
    check(RunConfig.from_yaml(write_project(tmp_path, tracking={"mlflow": None})))
    check(RunConfig.from_yaml(write_project(tmp_path)))


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert mlflow_place(MlflowConfig(), str(tmp_path)) == (folder, f"file://{tmp_path}/mlruns/artifacts/mlorq")
    assert mlflow_place(MlflowConfig(uri="https://server"), str(tmp_path)) == ("https://server", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert mlflow_place(MlflowConfig(), str(tmp_path)) == ("http://other:5000", None)
    assert mlflow_place(MlflowConfig(uri="mlruns"), str(tmp_path))[0] == folder


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"mlflow": {}}, {}),
        ({"mlflow": {"uri": "below"}}, {}),
        ({"mlflow": {"uri": "../outside"}}, {"MLORQ_ROOTS": "{root},{root}/../outside"}),
        ({"mlflow": {"uri": "https://server"}}, {"MLORQ_ROOTS": "{root},https://server"}),
        ({"wandb": {}}, {}),
        ({"wandb": {"project": "other"}}, {"MLORQ_ALLOWED_PROJECTS": "other"}),
        ({"wandb": {"entity": "team"}}, {"MLORQ_ALLOWED_PROJECTS": "team"}),
    ],
)
def test_deployments_log_only_where_the_owner_allows(
    settings: dict[str, Any], allowed: dict[str, str], tmp_path: Path
) -> None:
    config = RunConfig.from_yaml(write_project(tmp_path, tracking=settings))
    environment = {"MLORQ_ROOTS": str(tmp_path), "MLORQ_ALLOWED_FACTORIES": "*"}
    check_permitted(config, environment | {name: text.format(root=tmp_path) for name, text in allowed.items()})
    if allowed:
        with pytest.raises(ConfigError, match=f"tracking.*{next(iter(allowed))}"):
            check_permitted(config, environment)


# -- trackers -------------------------------------------------------------------------------------------------------


def test_mlflow_in_a_folder(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="extra mlflow is not installed")
    settings, run = MlflowConfig(uri="runs", experiment="nets"), a_run(tmp_path)
    location = to_mlflow(settings, run)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("nets").experiment_id
    (entry,) = client.search_runs([experiment])
    assert location.endswith(f"experiment 'nets' run {entry.info.run_id}")
    assert (entry.info.run_name, entry.info.status) == (run.name, "FINISHED")
    assert entry.data.params == run.parameters
    assert entry.data.metrics == run.metrics
    files = tmp_path / "runs" / "artifacts" / "nets" / entry.info.run_id / "artifacts"
    assert (files / "report.html").read_bytes() == REPORT
    assert json.loads((files / "allocation.json").read_bytes()) == run.allocation
    assert (files / "checkpoint" / "model.safetensors").read_bytes() == b"codes"
    assert (files / "checkpoint" / "preparation" / "tokenizer.json").is_file()
    # The same run again adds nothing; another run does, here without its checkpoint.
    assert to_mlflow(settings, run) == location
    to_mlflow(settings.model_copy(update={"checkpoint": False}), a_run(tmp_path, "net-4bit-0000"))
    assert len(client.search_runs([experiment])) == 2
    assert len(list((tmp_path / "runs").rglob("model.safetensors"))) == 1

    # An entry that could not be completed does not count.
    def broken() -> dict[str, bytes]:
        raise OSError("disk")

    failing = Tracked(**{**vars(run), "name": "net-5bit-0000", "checkpoint": broken})
    with pytest.raises(OSError, match="disk"):
        to_mlflow(settings, failing)
    to_mlflow(settings, a_run(tmp_path, "net-5bit-0000"))
    states = [one.info.status for one in client.search_runs([experiment], "tags.`mlorq.run` = 'net-5bit-0000'")]
    assert sorted(states) == ["FAILED", "FINISHED"]


class Wandb(ModuleType):
    """The calls of Weights & Biases that are used, which only record what they are given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.files: list[str] = []
        self.exit_code: int | None = -1
        self.url, self.dir = None, "wandb/offline-run"

    def init(self, **given: Any) -> Wandb:
        self.begun.append(given)
        return self

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data

    def Html(self, text: str, inject: bool) -> str:
        return text

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values

    def Artifact(self, name: str, type: str, metadata: dict[str, float]) -> Wandb:
        return self

    def add_dir(self, folder: str) -> None:
        self.files += sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())

    def log_artifact(self, artifact: Wandb) -> None:
        assert artifact is self

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb(wandb: Wandb, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert to_wandb(WandbConfig(project="nets", mode="offline"), run) == "wandb/offline-run"
    (begun,) = wandb.begun
    assert (begun["project"], begun["mode"], begun["id"], begun["resume"]) == ("nets", "offline", run.name, "allow")
    assert begun["config"] == run.parameters
    assert wandb.summary == run.metrics
    assert wandb.logged["report"] == REPORT.decode()
    assert wandb.logged["allocation"][1][0] == ["layer0", "Q", 3, None, 96]
    assert wandb.files == ["model.safetensors", "preparation/tokenizer.json"]
    assert wandb.exit_code is None


def test_a_run_is_logged_and_a_failing_tracker_costs_a_warning(
    prefect_server: str, wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.pipeline.get_run_logger", lambda: logging.getLogger("flows.pipeline"))
    monkeypatch.setattr(tracking, "_is_installed", lambda name: True)
    monkeypatch.setattr(tracking, "to_mlflow", lambda *arguments: (_ for _ in ()).throw(ConnectionError("no server")))
    settings = {"mlflow": {"uri": "http://127.0.0.1:9"}, "wandb": {"mode": "offline"}}
    write_project(tmp_path, rounding={"method": "nearest"}, search={"bits": [4], "factor_bits": []}, tracking=settings)
    (result,) = compress_flow("run.yaml", str(tmp_path), ["6bit"])["results"]
    assert result["tracking"] == {"wandb": "wandb/offline-run"}
    assert f"{result['run']} is not logged to mlflow: ConnectionError: no server" in caplog.text
    assert wandb.begun[0]["config"]["rounding.method"] == "nearest"
    assert wandb.summary["compressed.mean"] == result["metrics"]["compressed"]["mean"]
    assert wandb.files == ["mlorq.json", "model.safetensors"]
    assert result["run"] in wandb.logged["report"]
    assert Path(result["checkpoint"].removeprefix("file://"), "model.safetensors").is_file()
