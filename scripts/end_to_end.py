"""End-to-end check on one machine: image, server, workers, deployments, runs in two pools, event-triggered runs.

    .venv/bin/python scripts/end_to_end.py                        builds mlorq:latest from docker/Dockerfile
    .venv/bin/python scripts/end_to_end.py --image mlorq:test     uses an existing image with scikit-learn

The digits model of examples/ is compressed by the deployment `compress` in a process, then by `compress-docker` in a
container on the same store, which must reuse everything and compute nothing. The events of finished searches in both
pools, and then an event of a user, start `rebudget` and `rebudget-docker`. Every state, count and artifact is checked;
the first wrong one ends the script with status 1. Requires a Docker engine; the server and its database are temporary.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.prefect_stack import REPOSITORY, Stack

LAYERS = 14  # of the digits model
STEPS = 1 + 1 + LAYERS + LAYERS + 1 + 1 + LAYERS + 1 + 1 + 1 + 1
POOLS = {"mlorq": "process", "mlorq-docker": "docker", "mlorq-kubernetes": "kubernetes"}


def say(text: str) -> None:
    """Print a line on standard output, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def check(fact: bool, what: str, detail: Any = "") -> None:
    """Print that a check has passed.

    Raises:
        SystemExit: ``fact`` is false.
    """
    if not fact:
        raise SystemExit(f"FAILED: {what}: {detail}")
    say(f"  ok: {what}")


def build_image() -> str:
    """Build mlorq's image as in docker/README.md; returns its tag."""
    tag = "mlorq:latest"
    command = ["docker", "build", "-f", "docker/Dockerfile", "-t", tag, "--build-arg", "PACKAGES=scikit-learn", "."]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return tag


def make_project(folder: Path) -> dict[str, Any]:
    """Create a folder with the digits model, its trained weights and a store; returns the configuration."""
    folder.mkdir()
    shutil.copy(REPOSITORY / "examples" / "digits" / "digits.py", folder)
    config = yaml.safe_load((REPOSITORY / "examples" / "digits" / "digits.yaml").read_text())
    config["model"]["arguments"] = {"weights": str(folder / "digits.safetensors")}
    config["store"] = f"file://{folder / 'store'}"
    config["engine"] = {"devices": "cpu", "threads": 1}
    config["rounding"] = {"method": "lra", "iterations": 50}
    code = f"import digits; digits.build(weights={config['model']['arguments']['weights']!r})"
    # One thread: batches are small, and other workers may use the machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return dict(config)


def contents(store: Path) -> dict[str, int]:
    """Modification time of every file of a store, by path.

    Without the marks of runs that use it, and without the index of a search, which another software writes again.
    """
    files = (path for path in store.rglob("*") if path.is_file())
    kept = (path for path in files if path.relative_to(store).parts[0] not in ("leases", "search"))
    return {str(path): path.stat().st_mtime_ns for path in kept}


def wait_for_runs(stack: Stack, flow: str, count: int, seconds: float = 300) -> list[dict[str, Any]]:
    """Wait until ``count`` runs of a flow exist and have ended.

    Raises:
        SystemExit: they did not start in time.
        RuntimeError: one did not complete.
    """
    deadline = time.monotonic() + seconds
    while len(runs := stack.flow_runs(any_=[flow])) < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"FAILED: {len(runs)} runs of {flow} instead of {count}\n{stack.log('server')[-3000:]}")
        time.sleep(1)
    return [stack.wait(run["id"], seconds) for run in runs]


def go(stack: Stack, folder: Path, image: str) -> None:
    """Run all checks.

    Raises:
        SystemExit: a check failed.
    """
    say("project: training the digits model")
    config = make_project(folder)
    store = folder / "store"
    parameters = {"config": config, "folder": str(folder)}

    say("server, pools, deployments, workers")
    stack.start_server()
    for name, kind in POOLS.items():
        stack.create_pool(name, kind)
    stack.deploy()
    stack.start_worker("mlorq")
    stack.start_worker("mlorq-docker", "docker")

    say("compress in the process pool")
    run = stack.run("compress/compress", parameters)
    found = stack.wait(run, 600)
    check(str(config["budget"]) in found["name"], f"the run is called {found['name']!r}")
    states = stack.task_states(run, STEPS)
    check(states == {"Completed": STEPS}, f"{STEPS} steps computed", states)
    artifacts = stack.artifacts(run)
    for key in ("candidates", "sensitivity", f"round-{config['budget']}"):
        item = artifacts.get(key, {})
        done = item.get("type") == "progress" and float(item["data"]) == 100.0
        check(done, f"progress artifact {key} at 100 %", artifacts)
    for key, kind in {"allocation": "table", "budgets": "table", "result": "markdown", "pareto": "markdown"}.items():
        check(artifacts.get(key, {}).get("type") == kind, f"artifact {key}, a {kind}", sorted(artifacts))

    say("the finished search has started rebudget")
    further = wait_for_runs(stack, "rebudget", 1)
    states = stack.task_states(further[0]["id"], STEPS)
    check(states["Cached"] >= 2 + 2 * LAYERS, f"it reused the search: {dict(states)}", states)

    say("compress in the docker pool, on the same store")
    before = contents(store)
    # What a user sets in prefect.yaml for another image and other folders.
    variables = {
        "image": image,
        "volumes": [f"{folder}:{folder}"],
        "container_create_kwargs": {"user": f"{os.getuid()}:{os.getgid()}"},
        "env": {
            "PREFECT_API_URL": stack.url,
            "PREFECT_HOME": "/tmp/prefect",
            "HOME": "/tmp",
            **{name: value for name, value in stack.environment.items() if name.startswith("MLORQ_")},
        },
    }
    for name in ("compress/compress-docker", "rebudget/rebudget-docker"):
        stack.change_job_variables(name, variables)
    run = stack.run("compress/compress-docker", parameters)
    stack.wait(run, 600)
    states = stack.task_states(run, STEPS)
    check(states == {"Cached": STEPS}, f"all {STEPS} steps were Cached", states)
    after = contents(store)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    check(not changed, "the store is unchanged", changed)

    say("a search in the docker pool starts rebudget-docker")
    other = {**config, "seed": 1, "rounding": {"method": "nearest"}}
    run = stack.run("compress/compress-docker", {**parameters, "config": other})
    stack.wait(run, 600)
    *_, third = wait_for_runs(stack, "rebudget", 2)
    check(
        third["work_pool_name"] == "mlorq-docker", f"{third['name']!r} ran in the docker pool", third["work_pool_name"]
    )
    states = stack.task_states(third["id"], STEPS)
    check(states["Cached"] >= 2 + 2 * LAYERS and states["Completed"] >= 2, f"it reused the search: {dict(states)}")

    say("an event of a user starts rebudget")
    stack.emit("mlorq.rebudget.requested", "user.1", {**parameters, "budgets": ["3.5bit"]})
    *_, last = wait_for_runs(stack, "rebudget", 3)
    check("3.5bit" in last["name"], f"the run is called {last['name']!r}")
    states = stack.task_states(last["id"], STEPS)
    check(states["Cached"] >= 2 + 2 * LAYERS and states["Completed"] >= 1, f"it reused the search: {dict(states)}")
    time.sleep(5)
    check(len(stack.flow_runs(any_=["rebudget"])) == 3, "runs without a search have not started further runs")


def main() -> None:
    """Run the checks in a temporary folder."""
    parser = argparse.ArgumentParser(description="End-to-end check on one machine.")
    parser.add_argument("--image", help="an existing image; default: build mlorq:latest")
    arguments = parser.parse_args()
    image = arguments.image
    if image is None:
        say("image: building mlorq:latest")
        image = build_image()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlorq-e2e-") as temporary, Stack(Path(temporary) / "stack") as stack:
        try:
            go(stack, Path(temporary) / "project", image)
        except (SystemExit, RuntimeError):
            for log in sorted((Path(temporary) / "stack").glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
            raise
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
