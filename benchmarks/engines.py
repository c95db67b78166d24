"""What it costs to have a step carried out by threads, child processes, Dask workers or containers.

    .venv/bin/python benchmarks/engines.py [--engine threads …] [--image mlorq:latest]

The model is so small that its steps take milliseconds, so what is measured is the way there and back. Every engine runs
the whole flow on a Prefect server twice, with few and with more layers: the difference a layer task is the price of a
task, the rest is the price of starting (clusters, child processes, a model in each). Every run is on an empty store.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from scripts.prefect_stack import REPOSITORY, Stack
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session

FACTORY = """
import torch
from torch import nn

def build(layers=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))

def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator) for _ in range(2)]

def evaluate(model):
    return {"mean": float(model(batches()[0]).mean())}
"""
ENGINES: dict[str, dict[str, Any]] = {
    "threads": {"devices": ["cpu", "cpu"]},
    "subprocess": {"devices": ["cpu", "cpu"], "steps": "subprocess"},
    "dask": {"runner": "dask", "devices": "cpu", "dask": {"arguments": {"n_workers": 2, "threads_per_worker": 1}}},
    "docker": {"devices": ["cpu", "cpu"], "steps": "docker"},
}
SIZES = {"docker": (3, 6)}  # layers; a container a step takes seconds
TASKS_A_LAYER = 3  # candidates, sensitivity, round


def project(folder: Path, layers: int, engine: dict[str, Any]) -> Path:
    """A configuration with a store of its own."""
    folder.mkdir(parents=True)
    (folder / "chain.py").write_text(FACTORY)
    part = {"source": "custom", "factory": "chain:batches"}
    values = {
        "model": {"family": "custom", "factory": "chain:build", "arguments": {"layers": layers}},
        "data": {"calibration": part, "evaluation": {"source": "custom", "factory": "chain:evaluate"}},
        "budget": "4bit",
        "search": {"points": 2, "samples": 16, "hessian_samples": 16},
        "rounding": {"method": "nearest"},
        "store": "file://./store",
        "engine": {"threads": 1, **engine},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def digest(store: Path) -> str:
    """Of names and contents of all files but the manifests, which hold times."""
    found = hashlib.blake2b()
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            found.update(str(path.relative_to(store)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def without_prefect(path: Path) -> float:
    """Seconds of the same steps as plain calls."""
    config = RunConfig.from_yaml(path)
    session = Session(config, Store(config.resolve(config.store)))
    started = time.perf_counter()
    run_pipeline(session, InProcess(session), config.budgets)
    return time.perf_counter() - started


def with_prefect(path: Path, stack: Stack) -> float:
    """Seconds in the flow."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "compress", str(path), "--json"],
        env=stack.environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)["wall_seconds"])


def main() -> None:
    """Print one row an engine, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", action="append", choices=list(ENGINES))
    parser.add_argument("--image", default="mlorq:latest")
    parser.add_argument("--network", default=None, help="of the containers; host where the engine has no bridge")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Stack(Path(temporary) / "stack") as stack:
        stack.start_server()
        base = Path(temporary)
        without_prefect(project(base / "warm", 4, {}))
        for name in ["none", *(arguments.engine or ENGINES)]:
            engine = dict(ENGINES.get(name, {}))
            if name == "docker":
                engine["docker"] = {"image": arguments.image, "network": arguments.network}
            sizes = SIZES.get(name, (6, 24))
            seconds, digests = [], []
            for layers in sizes:
                path = project(base / name / str(layers), layers, engine)
                seconds.append(without_prefect(path) if name == "none" else with_prefect(path, stack))
                digests.append(digest(path.parent / "store"))
                reference = base / "reference" / f"{name}-{layers}"
                without_prefect(project(reference, layers, {}))
                assert digests[-1] == digest(reference / "store"), f"{name}: other bytes than in one process"
            task = (seconds[1] - seconds[0]) / (TASKS_A_LAYER * (sizes[1] - sizes[0]))
            fixed = seconds[0] - TASKS_A_LAYER * sizes[0] * task
            rows.append((name, task, fixed, f"{sizes[0]} and {sizes[1]}"))
            print(f"{name}: {seconds} s, bytes as in one process", file=sys.stderr, flush=True)
    base_task = rows[0][1]
    print(
        "| steps carried out by | seconds a layer task | overhead | seconds besides | layers |\n|---|---|---|---|---|"
    )
    for name, task, fixed, sizes_text in rows:
        label = "plain calls, no Prefect" if name == "none" else name
        print(f"| {label} | {task:.3f} | {task - base_task:+.3f} | {fixed:.1f} | {sizes_text} |")


if __name__ == "__main__":
    main()
