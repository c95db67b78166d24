"""What Prefect adds to a run: CPU-seconds and seconds of the same run through its flow and without it.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/prefect_overhead.py examples/minilm.yaml --set preset=fast

Each run is a process of its own, start-up included, with a store of its own; the flow brings its own server, as
``mlorq compress`` does where none is configured. Bytes and errors of both have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

PLAIN = """
import json, sys
from mlorq.config.run import RunConfig
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store


path, *pairs = sys.argv[1:]
config = RunConfig.from_yaml(path, dict(pair.split("=", 1) for pair in pairs))
session = Session(config, open_store(config))
(result,) = run_pipeline(session, InProcess(session), config.budgets)
print(json.dumps(result_json(session, result)))
"""


def timed(command: list[str], folder: str) -> tuple[float, float, dict[str, object]]:
    """CPU-seconds and seconds of a command, children included, and the JSON object that it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": f"{folder}/prefect", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, seconds, json.loads(done.stdout)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as for mlorq compress")
    parser.add_argument("--turns", type=int, default=1)
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"without Prefect": [], "through its flow": []}
    for _ in range(arguments.turns):
        found = []
        for name, spent in rows.items():
            with tempfile.TemporaryDirectory() as folder:
                pairs = [*arguments.set, f"store=file://{folder}/store", "engine.devices=cpu"]
                given = [arguments.config, *(part for pair in pairs for part in ("--set", pair)), "--json"]
                flow = [sys.executable, "-m", "flows.cli", "compress", *given]
                plain = [sys.executable, "-c", PLAIN, arguments.config, *pairs]
                cpu, seconds, result = timed(plain if name == "without Prefect" else flow, folder)
            spent.append((cpu, seconds))
            found.append((result["nmse"], result["bytes"]))
        assert found[0] == found[1], found
    print("| run | CPU-seconds | seconds |\n|---|---|---|")
    least = {name: tuple(min(column) for column in zip(*spent, strict=True)) for name, spent in rows.items()}
    for name, (cpu, seconds) in least.items():
        print(f"| {name} | {cpu:.1f} | {seconds:.1f} |")
    (own, _), (whole, _) = least.values()
    print(f"\nPrefect: {whole / own - 1:.1%} of the CPU time")


if __name__ == "__main__":
    main()
