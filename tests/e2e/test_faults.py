"""A worker or the server is killed in the middle of a run, or the store is down: only what is missing is computed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlorq.artifacts.gc import verify
from mlorq.artifacts.store import Store
from scripts.prefect_stack import Stack
from tests.engine import docker_engine, mlorq_image  # noqa: F401
from tests.flows.test_cli import FACTORY, write_project
from tests.s3 import s3_server

pytestmark = [pytest.mark.long, pytest.mark.timeout(600, func_only=True)]  # building the image takes longer

LAYERS = 6
STEPS = 1 + 1 + LAYERS + LAYERS + 1 + 1 + LAYERS + 1 + 1 + 1 + 1
OF_A_RUN = ("search", "report")  # no artifacts of steps
DEPLOYMENT = """
name: faults
deployments:
- name: compress
  entrypoint: flows/compress.py:compress_flow
  work_pool: {name: faults}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with Stack(folder) as stack:
        stack.start_server()
        stack.create_pool("faults", "process")
        (folder / "prefect.yaml").write_text(DEPLOYMENT)
        stack.prefect("deploy", "--all", "--prefect-file", str(folder / "prefect.yaml"))
        yield stack


@pytest.fixture(autouse=True)
def no_worker_is_left(stack: Stack) -> Iterator[None]:
    """The worker of a test that failed would take the next test's run."""
    yield
    stack.kill_workers()


def slow_project(folder: Path, **changes: Any) -> dict[str, Any]:
    """Parameters of a run whose fan-outs take some seconds."""
    path = write_project(folder, budget="4bit", rounding={"method": "nearest"}, **changes)
    slow = FACTORY.replace("        return self.head(", "        time.sleep(0.01)\n        return self.head(")
    (folder / "tiny_project.py").write_text(f"import time\n{slow}")
    return {"config": yaml.safe_load(path.read_text()), "folder": str(folder)}


def manifests(store: Path, step: str = "*") -> dict[str, int]:
    """Every artifact of a step with the time it was finished."""
    found = [path for path in store.glob(f"{step}/*/manifest.json") if path.parts[-3] not in OF_A_RUN]
    return {str(path): path.stat().st_mtime_ns for path in found}


def wait_for(store: Path, step: str, count: int, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while len(manifests(store, step)) < count:
        assert time.monotonic() < deadline, manifests(store)
        time.sleep(0.02)


def in_the_middle(stack: Stack, folder: Path) -> tuple[dict[str, Any], Path, str, str]:
    """A run in the middle of its fan-out: its parameters, store, worker and id."""
    parameters, store = slow_project(folder), folder / "store"
    worker = stack.start_worker("faults")
    run = stack.run("compress/compress", parameters)
    wait_for(store, "sensitivity", 2)
    return parameters, store, worker, run


def test_a_killed_worker(stack: Stack, tmp_path: Path) -> None:
    parameters, store, worker, first = in_the_middle(stack, tmp_path)
    stack.kill(worker)  # with the flow's process
    before = manifests(store)
    assert 2 <= len(manifests(store, "sensitivity")) < LAYERS
    # The server cannot know yet; what says so to it is the next worker's business or the user's.
    assert stack.flow_run(first)["state_name"] == "Running"
    worker = stack.start_worker("faults")
    second = stack.run("compress/compress", parameters)
    stack.wait(second)
    assert before.items() <= manifests(store).items()
    states = stack.task_states(second, STEPS)
    assert states == {"Cached": len(before), "Completed": STEPS - len(before)}
    stack.kill(worker, signal.SIGTERM)


@pytest.mark.docker
def test_a_killed_container_of_a_step(
    stack: Stack,
    tmp_path: Path,
    docker_engine: Any,  # noqa: F811
    mlorq_image: str,  # noqa: F811
) -> None:
    docker = {"image": mlorq_image, "network": "none"}
    parameters = slow_project(tmp_path, engine={"devices": "cpu", "threads": 1, "steps": "docker", "docker": docker})
    store = tmp_path / "store"
    worker = stack.start_worker("faults", MLORQ_ALLOWED_NETWORKS=docker["network"])
    run = stack.run("compress/compress", parameters)
    wait_for(store, "candidates", LAYERS)
    deadline = time.monotonic() + 400
    boxes: list[Any] = []
    while not boxes:
        assert time.monotonic() < deadline
        running = docker_engine.containers.list(filters={"label": "mlorq.step"})
        boxes = [box for box in running if box.labels["mlorq.step"].startswith("sensitivity ")]
    boxes[0].kill()
    before = manifests(store)
    stack.wait(run, 400)
    assert "was killed (status 137)" in stack.run_log(run)
    assert before.items() <= manifests(store).items()  # nothing was done twice
    assert stack.task_states(run, STEPS) == {"Completed": STEPS}
    assert not docker_engine.containers.list(all=True, filters={"label": "mlorq.step"})
    stack.kill(worker, signal.SIGTERM)


def test_a_killed_server(stack: Stack, tmp_path: Path) -> None:
    parameters, store, worker, first = in_the_middle(stack, tmp_path)
    stack.kill("server")
    before = manifests(store)
    time.sleep(3)
    stack.start_server()
    # Whether the run itself got over it is Prefect's affair: run again, it is finished and nothing is done twice.
    second = stack.run("compress/compress", parameters)
    stack.wait(second)
    stack.wait(first)
    assert before.items() <= manifests(store).items()
    assert len(manifests(store)) == STEPS
    stack.kill(worker, signal.SIGTERM)


def test_a_store_that_is_down_for_twenty_seconds(stack: Stack, tmp_path: Path) -> None:
    with s3_server() as server:
        url = server.new_bucket()
        parameters = slow_project(tmp_path, store=url, engine={"devices": "cpu", "threads": 1, "cache": None})
        worker = stack.start_worker("faults", **server.environment)
        run = stack.run("compress/compress", parameters)
        store = Store(url)
        deadline = time.monotonic() + 400
        while len(list(store.refs("sensitivity"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with server.down_for(20):
            time.sleep(1)
            assert stack.flow_run(run)["state_name"] == "Running"
        stack.wait(run)
        states = stack.task_states(run, STEPS)
        assert states == {"Completed": STEPS}  # the run itself got over it
        again = stack.run("compress/compress", parameters)
        stack.wait(again)
        assert stack.task_states(again, STEPS) == {"Cached": STEPS}
        assert verify(Store(url)).damaged == []
        stack.kill(worker, signal.SIGTERM)
