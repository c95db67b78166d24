"""What Prefect adds to a run: CPU-seconds and seconds of the same run through its flow and without it.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/prefect_overhead.py examples/minilm.yaml --set preset=fast

Each run is a process of its own, start-up included, with a store of its own: without Prefect; through the flow, which
brings its own server, as ``mlorq compress`` does where none is configured; through the flow on a server that runs
already, whose own CPU time is not counted. The database of Prefect exists, as it does from a second run on. Bytes
and errors of all have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLAIN_RUN, OWN_SERVER, RUNNING_SERVER = "without Prefect", "its own server", "a running server"

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


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, dict[str, object]]:
    """CPU-seconds and seconds of a command, children included, and the JSON object that it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, seconds, json.loads(done.stdout)


@contextmanager
def server(environment: dict[str, str]) -> Iterator[str]:
    """A Prefect server; yields the URL of its API."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("the Prefect server has ended") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as for mlorq compress")
    parser.add_argument("--turns", type=int, default=1)
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in (PLAIN_RUN, OWN_SERVER, RUNNING_SERVER)}
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
        upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
        subprocess.run(upgrade, env=environment, stdout=subprocess.DEVNULL, check=True)
        for _ in range(arguments.turns):
            found = []
            for name, spent in rows.items():
                with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                    pairs = [*arguments.set, f"store=file://{folder}/store", "engine.devices=cpu"]
                    given = [arguments.config, *(part for pair in pairs for part in ("--set", pair)), "--json"]
                    command = [sys.executable, "-m", "flows.cli", "compress", *given]
                    own = dict(environment)
                    if name == PLAIN_RUN:
                        command = [sys.executable, "-c", PLAIN, arguments.config, *pairs]
                    elif name == RUNNING_SERVER:
                        own["PREFECT_API_URL"] = stack.enter_context(server(environment))
                    cpu, seconds, result = timed(command, own)
                spent.append((cpu, seconds))
                found.append((result["nmse"], result["bytes"]))
            assert len(set(found)) == 1, found
    print("| run | CPU-seconds | seconds | Prefect |\n|---|---|---|---|")
    least = {name: tuple(min(column) for column in zip(*spent, strict=True)) for name, spent in rows.items()}
    for name, (cpu, seconds) in least.items():
        print(f"| {name} | {cpu:.1f} | {seconds:.1f} | {cpu / least[PLAIN_RUN][0] - 1:.1%} |")


if __name__ == "__main__":
    main()
