"""Secrets that users put into environments, URLs and options: no file, page, log or database shows them afterwards."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from flows.cli import main
from flows.compare import compare_flow
from flows.compress import compress_flow
from flows.rebudget import rebudget_flow
from flows.sweep import sweep_flow
from mlorq.artifacts import transfer
from steps.base import Outcome, StepSpec
from tests.flows.test_cli import prints_json, write_project
from tests.long import few
from tests.s3 import changed_environment, s3_server

SECRET = "Sx7-marked-9qK"  # of credentials that are used
REFUSED = "Rz4-marked-2wJ"  # of values that are refused
URLS = [
    f"s3://me:{REFUSED}@bucket/x",
    f"https://{REFUSED}@host/x",
    f"https://host/x?sig={REFUSED}",
    f"https://host/x?X-Amz-Signature={REFUSED}&X-Amz-Date=1",
    f"https://host/x?token={REFUSED}",
    f"abfs://box/x;AccountKey={REFUSED}",
]
TABLE: dict[str, Any] = {"source": "table", "text": [0], "path": "a.csv"}
TIMM: dict[str, Any] = {"family": "timm", "name": "vit_tiny_patch16_224"}
PLACES = {
    "store": lambda url: {"store": url},
    "model.checkpoint": lambda url: {"model": {**TIMM, "checkpoint": url}},
    "model.arguments": lambda url: {"model": {**TIMM, "checkpoint": "x", "arguments": {"weights": url}}},
    "data.calibration": lambda url: {"data": {"calibration": {**TABLE, "path": url}, "evaluation": TABLE}},
    "engine.cache": lambda url: {"engine": {"cache": url}},
    "export": lambda url: {"export": [{"to": "transformers", "source": url}]},
}
FLOWS = {"compress": compress_flow, "rebudget": rebudget_flow, "sweep": sweep_flow, "compare": compare_flow}


def found_in_folder(folder: Path, *left_out: Path) -> list[str]:
    """Files of a folder that show a secret."""
    files = (path for path in folder.rglob("*") if path.is_file() and path not in left_out)
    return [str(path) for path in files if shows(path.read_bytes())]


def shows(data: bytes) -> bool:
    return SECRET.encode() in data or REFUSED.encode() in data


def found_in_database(secret: str) -> set[str]:
    """Columns of Prefect's database that show a secret: runs, parameters, states, logs, artifacts, events."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    url = str(PREFECT_API_DATABASE_CONNECTION_URL.value())
    found = set()
    with sqlite3.connect(f"file:{url.partition('///')[2]}?mode=ro", uri=True) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert {"flow_run", "flow_run_state", "log", "artifact", "events"} <= set(tables)
        for table in tables:
            rows = database.execute(f'SELECT * FROM "{table}"')
            names = [column[0] for column in rows.description]
            for row in rows:
                found |= {f"{table}.{name}" for name, value in zip(names, row, strict=True) if secret in str(value)}
    return found


def recorded() -> None:
    """Wait until Prefect's server has the logs and events that this process has sent."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.instance().drain()
    EventsWorker.instance().drain()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, also for temporary files, with secrets in the environment."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return tmp_path


def without_secrets(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    out, err = capsys.readouterr()
    said = out + err + caplog.text
    assert SECRET not in said
    assert REFUSED not in said
    return err


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", few(URLS, URLS[0], URLS[3]), ids=lambda url: url.replace(REFUSED, "X"))
@pytest.mark.parametrize("key", PLACES)
def test_commands_refuse_them_without_showing_them(
    key: str, url: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = write_project(folder, **PLACES[key](url))
    for command in (["compress"], ["compress", "--dry-run"], ["sweep"], ["compare"], ["rebudget", "--allocate-only"]):
        assert main([command[0], str(path), *command[1:]]) == 2
        assert "holds a secret" in without_secrets(capsys, caplog) or key == "engine.cache"
    plain = write_project(folder)
    ((top, value),) = PLACES[key](url).items()
    assert main(["compress", str(plain), "--set", f"{top}={yaml.safe_dump(value, default_flow_style=True)}"]) == 2
    without_secrets(capsys, caplog)
    path.unlink(missing_ok=True)
    assert found_in_folder(folder) == []


@pytest.mark.parametrize("url", few(URLS, URLS[1]), ids=lambda url: url.replace(REFUSED, "X"))
def test_locations_in_arguments(
    url: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.5)  # nobody will answer
    plain = str(write_project(folder))
    place = url.replace("@host", "@127.0.0.1:9").replace("//host", "//127.0.0.1:9")
    for argv in (
        ["compress", plain, "--output", place],
        ["compress", place],
        ["evaluate", place, plain],
        ["inspect", place],
        ["export", place, "--output", str(folder / "x.safetensors")],
        ["store", "ls", "--store", place],
        ["store", "gc", "--store", place, "--keep", "x"],
        ["runs", "--store", place],
        ["compress", plain, "--set", place],
        ["compress", plain, "--set", f"store=[{place}"],
        ["compress", plain, "--set", f"budget={place}"],
        ["compress", plain, "--set", f"model.arguments.token={REFUSED}"],
        ["compress", plain, "--budget", place],
    ):
        # An HTTP server that lists nothing is an empty store.
        assert main(argv) in ((0, 2) if argv[0] in ("store", "runs") else (2,)), argv
        assert "Traceback" not in without_secrets(capsys, caplog)
    assert found_in_folder(folder) == []


@pytest.mark.parametrize("name", few(FLOWS, "compare"))
def test_runs_of_deployments_refuse_them(
    name: str,
    folder: Path,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prefect keeps the parameters that it was sent (docs/SECURITY.md); nothing else shows them."""
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow

    monkeypatch.setenv("MLORQ_ROOTS", "*")
    monkeypatch.setenv("MLORQ_ALLOWED_FACTORIES", "*")
    path = write_project(folder)
    values = yaml.safe_load(path.read_text())
    caplog.set_level(logging.DEBUG, logger="prefect")
    for key, url in zip(PLACES, URLS, strict=True):
        parameters = {"config": values | PLACES[key](url), "folder": str(folder)}
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(client.create_flow(FLOWS[name]), f"secrets-{name}")
            created = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        state = run_flow(FLOWS[name], flow_run=created, parameters=parameters, return_type="state")
        assert state.is_failed()
    parameters = {"config": f"https://me:{REFUSED}@127.0.0.1:9/run.yaml"}
    with get_client(sync_client=True) as client:
        created = client.create_flow_run_from_deployment(deployment, parameters=parameters)
    assert run_flow(FLOWS[name], flow_run=created, parameters=parameters, return_type="state").is_failed()
    recorded()
    without_secrets(capsys, caplog)
    assert found_in_database(REFUSED) <= {"flow_run.parameters"}
    assert found_in_database(REFUSED)  # the search finds what is there
    assert found_in_folder(folder) == []


# -- used ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_credentials_of_a_store_that_breaks_down(
    folder: Path,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that fails in the middle, and one that finishes, from the command line, with all that they write."""
    pytest.importorskip("s3fs")
    import flows.executor as executor

    caplog.set_level(logging.DEBUG, logger="mlorq")
    caplog.set_level(logging.DEBUG, logger="prefect")
    monkeypatch.setattr(executor, "RETRY_SECONDS", ())
    monkeypatch.setattr("steps.faults.RETRY_SECONDS", ())
    with s3_server() as server:
        secrets: dict[str, str | None] = {
            **server.environment, "FSSPEC_S3_SECRET": SECRET, "FSSPEC_S3_TOKEN": SECRET, "FSSPEC_S3_KEY": "somebody"
        }  # fmt: skip
        with changed_environment(secrets):
            url = server.new_bucket()
            engine = {"devices": "cpu", "threads": 1, "cache": str(folder / "cache")}
            path = write_project(
                folder,
                store=url,
                budget="4.2bit",
                engine=engine,
                rounding={"method": "nearest"},
                export=[{"to": "dense"}],
            )
            with monkeypatch.context() as patch:
                finished = executor.PrefectExecutor.run

                def cut(self: Any, spec: StepSpec) -> Outcome:
                    outcome = finished(self, spec)
                    if spec.step == "capture":
                        self.session.store.files.patience = 0.0
                        server.cut()
                    return outcome

                patch.setattr(executor.PrefectExecutor, "run", cut)
                assert main(["compress", str(path), "--verbose"]) == 2
            said = without_secrets(capsys, caplog)
            assert len([line for line in said.splitlines() if line.startswith("mlorq: error: ")]) == 1
            assert transfer.can_pass(ConnectionError())
            server.mend()
            result = prints_json(capsys, "compress", path, "--output", folder / "out", "--verbose")
            assert result["steps"]["reused"] >= 2
            assert main(["report", result["run"], str(path), "--output", str(folder / "page.html")]) == 0
            assert main(["store", "verify", str(path)]) == 0
            without_secrets(capsys, caplog)
            files = fsspec.filesystem("s3").find(url)
            assert len(files) > 50
            assert [name for name in files if shows(fsspec.filesystem("s3").cat_file(name))] == []
    recorded()
    assert found_in_folder(folder) == []
    assert found_in_database(SECRET) == set()
    assert os.environ["HF_TOKEN"] == SECRET
