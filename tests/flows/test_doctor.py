"""``mlorq doctor``: versions, services, deadlines, and what a configuration needs."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import socket
import sys
import threading
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import main
from flows.doctor import machine, packages, services, torch_report
from flows.doctor.needs import absent_rows, file_rows, needs_of
from flows.doctor.packages import PURPOSES, package_rows
from flows.doctor.row import Check, Row, needed, run_checks
from flows.doctor.services import dask_rows, docker_rows, prefect_rows
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.extras import install_command
from mlorq.fitting import viterbi
from tests.flows.test_cli import write_project

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@contextmanager
def serving(answers: dict[str, tuple[int, Any]], token: str | None = None, *, raw: bool = False) -> Iterator[str]:
    """An HTTP server with JSON answers by path; gives its host and port.

    Args:
        answers: status and value by path; other paths are unknown.
        raw: whether to send texts as they are, not as JSON.
        token: value of the header Authorization without which the status is 401.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, value = answers.get(self.path.partition("?")[0], (404, {"message": "unknown"}))
            if token is not None and self.headers.get("Authorization") != token:
                status, value = 401, {}
            body = (value if raw else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed() -> str:
    """Host and port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


# -- rows -------------------------------------------------------------------------------------------------------


def test_checks_that_hang_or_fail_are_rows() -> None:
    forever = threading.Event()

    def hangs() -> list[Row]:
        forever.wait()
        return []

    def fails() -> list[Row]:
        raise ValueError("a driver's\nmessage with https://user:secret@host")

    good = Row("good", "ok", "found")
    found = run_checks([Check("hanging", hangs, 0.05), Check("failing", fails, 5), Check("good", lambda: [good], 5)])
    forever.set()
    assert [(row.name, row.state) for row in found] == [("hanging", "problem"), ("failing", "problem"), ("good", "ok")]
    assert found[0].detail == "no answer within 0 s"
    assert found[1].detail == "ValueError: a driver's message with https://user:***@host"


def test_a_row_fails_if_it_is_needed_and_not_ok() -> None:
    rows = [Row("package numpy", "problem", ""), Row("extra s3", "missing", ""), Row("torch", "ok", "")]
    found = needed(rows, {"packages": "every run", "torch": "every run"})
    assert [(row.needed_by, row.failed) for row in found] == [("every run", True), ("", False), ("every run", False)]


# -- packages ---------------------------------------------------------------------------------------------------


def test_every_extra_has_a_purpose_and_all_names_every_one() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(PURPOSES) == set(extras) - {"dev", "docs", "all"}
    assert extras["all"] == [f"mlorq[{','.join(sorted(PURPOSES))}]"]


def test_versions_are_compared_with_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "numpy>=999",
        "pydantic<3,>=2",
        "no-such-package>=1",
        "no-such-package-either; python_version < '3'",
        "pyyaml<1; extra == 's3'",
        "rich>=1; extra == 'onnx'",
        "no-such-package; extra == 'hub'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    rows = {row.name: row for row in package_rows()}
    assert {name: row.state for name, row in rows.items() if not name.startswith("extra")} == {
        "package numpy": "problem",
        "package no-such-package": "missing",
    }
    version = importlib.metadata.version("numpy")
    assert rows["package numpy"].detail == f"numpy {version}, not >=999"
    assert rows["package numpy"].advice == "pip install 'numpy>=999'"
    assert [rows[f"extra {name}"].state for name in ("s3", "onnx", "hub")] == ["problem", "ok", "missing"]
    assert rows["extra hub"].advice == install_command("hub")
    assert PURPOSES["hub"] in rows["extra hub"].detail


def test_the_installed_packages_are_within_the_bounds() -> None:
    assert [row for row in package_rows() if row.name.startswith("package") and row.state != "ok"] == []


# -- kernels ----------------------------------------------------------------------------------------------------


def test_the_compiled_loops_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlorq.fitting._viterbi")
    assert torch_report.compiled_row().state == "ok"

    def wrong(*arguments: Any) -> None:
        viterbi.round_block(*arguments)
        arguments[6][:] += 1

    monkeypatch.setattr(viterbi, "block_functions", lambda: (wrong, viterbi.descend_block))
    assert torch_report.compiled_row().state == "problem"
    monkeypatch.setitem(sys.modules, "mlorq.fitting._viterbi", None)
    assert torch_report.compiled_row().state == "missing"


@pytest.mark.parametrize(
    ("has", "place", "state"), [(False, "cuda:0", "missing"), (True, "cuda:0", "ok"), (True, "cpu", "problem")]
)
def test_triton_kernels_are_those_that_the_search_would_use(
    has: bool, place: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: with what the library says about one."""

    def chosen(device: torch.device, bits: int) -> Any:
        if torch.device(place) != device:
            warnings.warn("trellis codes are computed on the CPU: no compiler", RuntimeWarning, stacklevel=1)
        return viterbi.TensorFunctions(viterbi.round_block, viterbi.descend_block, torch.device(place))  # type: ignore[arg-type]

    monkeypatch.setattr("mlorq.fitting.cuda.has_kernels", lambda device: has)
    monkeypatch.setattr("mlorq.fitting.viterbi.tensor_functions", chosen)
    row = torch_report.triton_row(torch.device("cuda:0"))
    assert (row.name, row.state) == ("kernels of cuda:0", state)
    assert ("no compiler" in row.detail) == (state == "problem")


def test_a_driver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_report, "SECONDS", 0.01)
    assert [(row.name, row.state) for row in torch_report.torch_rows()] == [("torch", "problem")]


def test_a_torch_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    (row,) = torch_report.torch_rows()
    assert (row.name, row.state) == ("torch", "problem")
    assert "libcudart.so.12" in row.detail


# -- services ---------------------------------------------------------------------------------------------------


def prefect_row(url: str, **settings: str) -> Row:
    """The row of the server at a URL."""
    from prefect import settings as known

    values = {"PREFECT_API_URL": url, **settings}
    with known.temporary_settings({getattr(known, name): value for name, value in values.items()}):
        (row,) = prefect_rows()
    return row


def test_no_prefect_server_is_needed() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        (row,) = prefect_rows()
    assert row.state == "ok"
    assert "PREFECT_API_URL is not set" in row.detail


def test_a_prefect_server_says_its_version_and_whether_it_authenticates() -> None:
    import prefect

    answers = {"/api/admin/version": (200, prefect.__version__)}
    with serving(answers) as place:
        row = prefect_row(f"http://{place}/api")
        assert (row.state, "without authentication" in row.detail) == ("ok", True)
        assert f"version {prefect.__version__}" in row.detail
    with serving(answers, token="Basic bWU6c2VjcmV0") as place:
        row = prefect_row(f"http://{place}/api", PREFECT_API_AUTH_STRING="me:secret")
        assert (row.state, "with authentication" in row.detail, "secret" in row.detail) == ("ok", True, False)
        row = prefect_row(f"http://{place}/api", PREFECT_API_AUTH_STRING="me:wrong")
        assert (row.state, "refuses the credentials" in row.detail) == ("problem", True)
    with serving(answers, token="Bearer abc") as place:
        assert prefect_row(f"http://{place}/api", PREFECT_API_KEY="abc").state == "ok"
        assert prefect_row(f"http://{place}/api").state == "problem"


def test_a_prefect_server_of_another_version_or_at_another_address(closed: str) -> None:
    with serving({"/api/admin/version": (200, "2.20.1")}) as place:
        row = prefect_row(f"http://{place}/api")
        assert (row.state, row.advice) == ("problem", "use the same version of Prefect on both sides")
        row = prefect_row(f"http://{place}")
        assert (row.state, "status 404" in row.detail) == ("problem", True)
    with serving({"/api/health": (200, True)}) as place:  # as Prefect Cloud
        row = prefect_row(f"http://{place}/api/")
        assert (row.state, "version unknown" in row.detail) == ("ok", True)
    with serving({"/admin/version": (200, "page")}, raw=True) as place:
        assert "otherwise than a Prefect server" in prefect_row(f"http://{place}").detail
    row = prefect_row(f"http://me:secret@{closed}/api")
    assert (row.state, "does not answer" in row.detail, "secret" in row.detail) == ("problem", True, False)


def test_a_prefect_server_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        row = prefect_row(f"http://127.0.0.1:{listener.getsockname()[1]}/api")
    assert (row.state, "does not answer" in row.detail) == ("problem", True)


def test_docker(monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    pytest.importorskip("docker.errors")
    monkeypatch.setenv("DOCKER_HOST", f"tcp://{closed}")
    (row,) = docker_rows(None)
    assert (row.state, closed in row.detail) == ("missing", True)
    version = (200, {"Version": "27.5.1", "ApiVersion": "1.45"})
    with serving({"/version": version, "/v1.45/version": version, "/v1.45/images/mine/json": (200, {})}) as place:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://{place}")
        assert docker_rows(None) == [Row("Docker engine", "ok", "version 27.5.1")]
        assert docker_rows("mine")[0].state == "ok"
        (row,) = docker_rows("other")
        assert (row.state, row.advice.startswith("docker build ")) == ("problem", True)
    monkeypatch.setitem(sys.modules, "docker", None)
    monkeypatch.setattr(services, "_installed", lambda package: False)
    assert docker_rows(None)[0].advice == install_command("docker")


def test_dask(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect_dask")
    assert dask_rows(None)[0].state == "ok"
    assert dask_rows(f"tcp://{closed}")[0].state == "problem"
    assert dask_rows("tcp://host:port")[0].state == "problem"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert dask_rows(f"tcp://127.0.0.1:{listener.getsockname()[1]}")[0].state == "ok"
    monkeypatch.setattr(services, "_installed", lambda package: False)
    assert dask_rows(None)[0].state == "missing"


# -- the machine ------------------------------------------------------------------------------------------------


def test_little_space_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, memory, disk = machine.machine_rows(tmp_path / "not" / "there")
    assert (disk.name, str(tmp_path) in disk.detail) == ("disk", True)
    monkeypatch.setattr(machine, "LEAST_DISK", 10**18)
    monkeypatch.setattr(machine, "LEAST_MEMORY", 10**18)
    _, memory, disk = machine.machine_rows(tmp_path)
    assert (memory.state, disk.state) == ("problem", "problem")
    total, free = machine.machine_memory()
    assert 0 < free <= total


def test_a_store_is_probed_and_not_created(tmp_path: Path) -> None:
    def row(folder: Path) -> Row:
        (found,) = machine.store_rows(Store(f"file://{folder}"), folder)
        return found

    assert (row(tmp_path / "new" / "store").state, list(tmp_path.iterdir())) == ("ok", [])
    assert (row(tmp_path).state, list(tmp_path.iterdir())) == ("ok", [])
    (tmp_path / "file").write_text("")
    assert row(tmp_path / "file").state == "problem"
    assert row(tmp_path / "file" / "store").state == "problem"
    assert machine.store_rows(Store("memory://doctor"), None)[0].state == "ok"


# -- what a configuration needs -----------------------------------------------------------------------------------


def test_needs(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(write_project(tmp_path))
    every = {"packages": "every run", "torch": "every run", "store": "every run", "Prefect server": "every run"}
    assert needs_of(config) == every | {"device cpu": "engine.devices"}
    coco = {"source": "coco", "root": "images", "annotations": "annotations.json"}
    values = {
        "model": {"family": "detection", "name": "mask_rcnn_swin_tiny", "checkpoint": "model.pth"},
        "data": {"calibration": coco, "evaluation": coco},
        "export": [{"to": "onnx"}, {"to": "dense"}],
        "target": "openvino",
        "store": "s3://bucket/store",
        "engine": {"runner": "dask", "steps": "docker", "devices": ["cuda:0"]},
    }
    assert needs_of(RunConfig.from_mapping(values, str(tmp_path))) == every | {
        "extra detection": "data.evaluation",
        "extra onnx": "export to onnx",
        "extra openvino": "target openvino",
        "extra s3": "store",
        "extra dask": "engine.runner",
        "extra docker": "engine.steps",
        "Dask": "engine.runner",
        "Docker engine": "engine.steps",
    }
    glue = {"source": "glue", "task": "sst2"}
    values |= {"data": {"calibration": glue, "evaluation": glue | {"path": "sst2"}}, "engine": {"devices": "cuda"}}
    values |= {"model": {"family": "transformers", "name": "model", "task": "text-classification"}}
    found = needs_of(RunConfig.from_mapping(values, str(tmp_path)))
    assert (found["extra hub"], found["device cuda"]) == ("data.calibration", "engine.devices")


def test_devices_that_are_not_found() -> None:
    gpu, cpu = Row("device cuda:0", "ok", ""), Row("device cpu", "ok", "")
    asked = {"device cuda": "", "device cuda:1": "", "device cpu": ""}
    assert [row.name for row in absent_rows([cpu, gpu], asked)] == ["device cuda:1"]
    none = Row("device cuda", "missing", "")
    assert [row.name for row in absent_rows([cpu, none], asked)] == ["device cuda:1"]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    images = {"source": "image_folder", "root": "images", "labels": "labels.tsv"}
    values = {
        "model": {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "https://host/weights.safetensors"},
        "data": {"calibration": images, "evaluation": images},
    }
    config = RunConfig.from_mapping(values, str(tmp_path))
    (tmp_path / "images").mkdir()
    rows = file_rows(config)
    assert [row.needed_by for row in rows] == ["data.calibration", "data.evaluation"]
    assert all(row.failed and f"{tmp_path}/labels.tsv does not exist" in row.detail for row in rows)
    (tmp_path / "labels.tsv").write_text("")
    (row,) = file_rows(config)
    assert (row.state, row.detail) == ("ok", "5 files and folders are there")


# -- the command ------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    project = write_project(tmp_path, engine={"devices": ["cpu", "cuda:77"]})
    assert main(["doctor", str(project), "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = {row["name"]: row for row in found["rows"]}
    assert {"Python", "memory", "disk", "packages", "torch", "store", "Prefect server", "Docker engine", "Dask"} <= (
        rows.keys()
    )
    assert found["ok"] is False
    assert rows["device cuda:77"]["state"] == "missing"
    assert rows["device cpu"] | {"detail": ""} == Row("device cpu", "ok", "", "", "engine.devices").to_json()
    assert rows["kernels of the CPU"]["state"] in ("ok", "missing")
    assert "mlorq: error: engine.devices needs device cuda:77: torch does not find it" in err
    assert not (tmp_path / "store").exists()

    monkeypatch.setattr(torch_report, "torch_rows", lambda: [Row("torch", "ok", "2.6"), Row("device cpu", "ok", "")])
    monkeypatch.setattr(packages, "package_rows", lambda: [Row("extra s3", "missing", "not installed", "install it")])
    assert main(["doctor", str(write_project(tmp_path))]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["missing", "extra", "s3", "not", "installed"] in lines
    assert ["→", "install", "it"] in lines


def test_a_wrong_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(write_project(tmp_path, preset="rapid"))]) == 2
    assert capsys.readouterr().err.startswith("mlorq: error: ")
