"""Runners of steps and fan-outs: whichever carries a run out, the artifacts are the same, and losses are redone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import steps.pipeline as pipeline
from flows.cluster_worker import _free, _kept
from flows.dask_pool import DaskPool, offered_by, resources_of
from flows.run import open_session
from flows.runners import ChildRunner, InProcessRunner, make_runner
from flows.runners.child import child_environment
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, ModelError, StoreError, TransientError
from mlorq.models.layer_list import Layer
from steps.base import Needs, StepSpec
from tests.flows.test_cli import fails, prints_json, write_project
from tests.watch import Watch


def project(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_yaml(write_project(folder, **changes))


def first_steps(config: RunConfig) -> tuple[StepSpec, StepSpec]:
    """The ``layers`` and ``capture`` steps of a run."""
    session = open_session(config)
    layers = pipeline.layers.spec(session)
    return layers, pipeline.capture.spec(session, session.model_ref, layers.ref, [])


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store but manifests and pages of runs, which hold times, and indices of searches (paths)."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {
        name: data
        for name, data in found.items()
        if not name.endswith("manifest.json") and not name.startswith(("search/", "report/"))
    }


# -- child processes ----------------------------------------------------------------------------------------------


def test_a_child_makes_the_same_artifacts_and_serves_many_steps(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = project(tmp_path / "a"), project(tmp_path / "b")
    inside, child = InProcessRunner(open_session(ours).worker), ChildRunner(theirs, "cpu")
    watch = Watch()
    try:
        for spec in first_steps(ours):
            made = inside.run(spec, Watch())
            outcome = child.run(spec, watch)
            assert (outcome.ref, outcome.reused) == (made.ref, False)
        process = child._process
        assert child.run(spec, watch).reused
        assert child._process is process  # one for all
    finally:
        child.close()
    assert files(tmp_path / "a" / "store") == files(tmp_path / "b" / "store")
    assert watch.done
    assert watch.done[-1][0] <= watch.done[-1][1]
    assert "a library that prints" in watch.lines  # and not among the events


def test_a_childs_error_comes_back_as_what_it_was(tmp_path: Path) -> None:
    config = project(tmp_path)
    layers, capture = first_steps(config)
    broken = project(tmp_path, search={"exclude": ["*"]})
    child = ChildRunner(broken, "cpu")
    try:
        with pytest.raises(ModelError, match="no compressible layers with include"):
            child.run(pipeline.layers.spec(open_session(broken)), Watch())
        with pytest.raises(StoreError, match="is not in the store"):
            child.run(capture, Watch())
        other = StepSpec("layers", 999, layers.params, layers.inputs)
        with pytest.raises(ConfigError, match="the flow's version of mlorq"):
            child.run(other, Watch())
        with pytest.raises(RuntimeError, match="ValidationError"):  # a defect, with the child's traceback
            child.run(StepSpec("capture", capture.version, {}, {}), Watch())
    finally:
        child.close()


def test_a_killed_child_is_a_passing_fault_and_the_next_step_gets_another(tmp_path: Path) -> None:
    config = project(tmp_path)
    layers, capture = first_steps(config)
    child = ChildRunner(config, "cpu")

    def kill() -> None:
        assert child._process is not None
        os.kill(child._process.pid, signal.SIGKILL)

    try:
        child.run(layers, Watch())
        with pytest.raises(TransientError, match=r"capture: its process was ended by SIGKILL \(out of memory\?\)"):
            child.run(capture, Watch(on_progress=kill))
        assert not child.run(capture, Watch()).reused
    finally:
        child.close()


def test_an_interrupted_child_is_gone(tmp_path: Path) -> None:
    config = project(tmp_path)
    child = ChildRunner(config, "cpu")
    watch = Watch()
    timer = threading.Timer(0.7, lambda: setattr(watch, "stop", KeyboardInterrupt()))  # while it imports torch
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        child.run(first_steps(config)[0], watch)
    assert child._process is None
    assert not (tmp_path / "store" / "layers").exists()


def test_a_child_sees_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert child_environment("cuda:1", 3)["CUDA_VISIBLE_DEVICES"] == "1"
    assert child_environment("cuda:1", 3)["OMP_NUM_THREADS"] == "3"
    assert child_environment("cpu", None)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert child_environment("cuda:1", None)["CUDA_VISIBLE_DEVICES"] == "GPU-7"


@pytest.mark.parametrize("engine", [{"steps": "subprocess"}, {"runner": "dask"}])
def test_a_store_in_memory_is_refused(
    engine: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], prefect_server: str
) -> None:
    line = fails(capsys, "compress", write_project(tmp_path, engine=engine, store="memory://runners"))
    assert "lives in one process" in line


def test_make_runner_follows_the_configuration(tmp_path: Path) -> None:
    session = open_session(project(tmp_path))
    assert isinstance(make_runner(session.config, "cpu", lambda: session.worker), InProcessRunner)
    config = project(tmp_path, engine={"steps": "subprocess"})
    assert isinstance(make_runner(config, "cpu", lambda: session.worker), ChildRunner)


# -- whole runs ---------------------------------------------------------------------------------------------------

ENGINES: dict[str, dict[str, Any]] = {
    "threads": {"devices": ["cpu", "cpu"]},
    "subprocess": {"devices": ["cpu", "cpu"], "steps": "subprocess"},
    "dask": {
        "runner": "dask",
        "devices": "cpu",
        "dask": {"arguments": {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1"}},
    },
    "ray": {"runner": "ray", "devices": "cpu", "ray": {"arguments": {"num_cpus": 2}}},
}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_engine_makes_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefect_server: str
) -> None:
    pytest.importorskip("prefect_ray")
    stores = {}
    for name, engine in ENGINES.items():
        folder = tmp_path / name
        folder.mkdir()
        # Two budgets, each with activations' widths of its own: a worker has to go back and forth between plans.
        changes = {"budget": ["4bit", "5bit"], "activations": {"bits": 6, "choices": [4, 6, 8], "compute": "4x6"}}
        found = prints_json(capsys, "compress", write_project(folder, engine={"threads": 1, **engine}, **changes))
        assert found["steps"]["reused"] == 0
        assert all(one["activations"]["bit_operations"] > 0 for one in found["results"])
        stores[name] = files(folder / "store")
    assert stores["subprocess"] == stores["threads"]
    assert stores["dask"] == stores["threads"]
    assert stores["ray"] == stores["threads"]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cluster", ["dask", "ray"])
def test_workers_of_a_cluster_are_quiet(tmp_path: Path, prefect_server: str, cluster: str) -> None:
    pytest.importorskip(f"prefect_{cluster}")
    command = [sys.executable, "-m", "flows.cli", "compress", str(write_project(tmp_path, engine=ENGINES[cluster]))]
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
        environment.pop(name, None)
    for options, shown in (([], False), (["--verbose"], True)):
        run = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert ("| INFO" in run.stderr) is shown
        shutil.rmtree(tmp_path / "store")


@pytest.mark.timeout(300)
def test_a_killed_child_costs_its_layer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.executor.RETRY_SECONDS", (0, 0))
    killed: list[int] = []
    run = ChildRunner.run

    def kill_once(self: ChildRunner, spec: StepSpec, watch: Any) -> Any:
        if spec.step == "candidates" and spec.layer == "head" and not killed:
            process = self._process or self._start()
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            while process.poll() is None:
                time.sleep(0.01)
            self._process = None
            raise TransientError("killed")
        return run(self, spec, watch)

    monkeypatch.setattr(ChildRunner, "run", kill_once)
    project = write_project(tmp_path, budget="4.7bit", engine={"devices": "cpu", "threads": 1, "steps": "subprocess"})
    result = prints_json(capsys, "compress", project)
    assert len(killed) == 1
    assert result["steps"]["reused"] == 0
    assert len(list((tmp_path / "store" / "candidates").iterdir())) == 6


# -- Dask's workers -----------------------------------------------------------------------------------------------


def dask_project(folder: Path) -> RunConfig:
    """A run on one worker in this process, of two threads."""
    own = {"n_workers": 1, "threads_per_worker": 2, "processes": False}
    return project(folder, engine={"runner": "dask", "devices": "cpu", "threads": 1, "dask": {"arguments": own}})


def test_a_dask_worker_goes_on_when_its_memory_fills_and_steps_know_what_is_left(tmp_path: Path) -> None:
    with DaskPool(dask_project(tmp_path)) as pool:
        client = pool._runner.client
        (worker,) = client.cluster.workers.values()
        manager = worker.memory_manager
        assert manager.memory_pause_fraction is manager.memory_spill_fraction is False
        assert not manager.memory_target_fraction
        assert 0 < client.submit(_free).result() < manager.memory_limit
        assert pool._home_worker() is None  # a preference for the only worker would outlive it
    assert _free() is None


def test_a_worker_that_is_lost_again_and_again_is_one_line(tmp_path: Path) -> None:
    from distributed.scheduler import KilledWorker

    pool = DaskPool(dask_project(tmp_path))
    found = pool.explained(KilledWorker("a task", None, 3))  # type: ignore[arg-type]
    assert isinstance(found, TransientError)
    assert "its worker was lost 4 times; out of memory?" in str(found)
    other = ValueError("another")
    assert pool.explained(other) is other


def test_threads_of_a_worker_share_the_data_and_not_the_model(tmp_path: Path) -> None:
    config = dask_project(tmp_path)
    kept = _kept("a run", config)
    assert _kept("a run", config) is kept
    first, second = kept.worker().context, kept.worker().context
    session = kept.session
    assert first.model(session.model_ref).module is not second.model(session.model_ref).module
    assert first.calibration(session.calibration_ref) is second.calibration(session.calibration_ref)
    assert _kept("another run", config) is not kept


def test_layers_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find_layers = pipeline.layers.find_layers

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return find_layers(*args, **kwargs)

    monkeypatch.setattr(pipeline.layers, "find_layers", counted)
    session = open_session(project(tmp_path))
    listed = pipeline.layers.discover(session)  # as the checks before a run do
    spec = pipeline.layers.spec(session)
    assert not spec.needs.device  # no worker of a cluster finds them once more
    assert not InProcessRunner(session.worker).run(spec, Watch()).reused
    assert session.artifacts.layers(spec.ref).layers == listed.layers
    assert len(calls) == 1


# -- what a step needs --------------------------------------------------------------------------------------------


def test_needs_are_asked_of_workers_that_offer_them() -> None:
    layer = Layer("a", "linear", 64, 32, 1, 1, 0, 0, 0)
    needs = Needs.of_layer(layer)
    assert needs.memory_bytes >= 3 * 8 * 64 * 32
    offered = offered_by([{"GPU": 1.0, "MEMORY": 1e9, "OTHER": 1.0}, {"GPU": 2.0, "MEMORY": 2e9}])
    assert offered == {"GPU": 2.0, "MEMORY": 2e9}
    assert resources_of(needs, offered) == {"GPU": 1.0, "MEMORY": float(needs.memory_bytes)}
    assert resources_of(Needs(memory_bytes=3 * 10**9), offered)["MEMORY"] == 2e9  # more would wait forever
    assert resources_of(needs, offered_by([])) == {}
    assert resources_of(Needs(device=False), offered) == {}
    assert Needs.of_layer(Layer("b", "linear", 640, 32, 1, 1, 0, 0, 0)).memory_bytes > needs.memory_bytes


def test_a_cluster_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefect_server: str
) -> None:
    engine: dict[str, Any] = {"runner": "dask", "dask": {"cluster": "no_such_package.Cluster"}}
    assert "engine.dask: no cluster no_such_package.Cluster" in fails(
        capsys, "compress", write_project(tmp_path, engine=engine)
    )
    engine = {"runner": "ray", "ray": {"arguments": {"no_such": 1}}}
    found = fails(capsys, "compress", write_project(tmp_path, engine=engine))
    if importlib.util.find_spec("prefect_ray") is None:
        assert "engine.runner: ray needs the extra ray: " in found
    else:
        assert "engine.ray: a cluster of this machine cannot be used" in found
