"""A temporary Prefect server with workers on this machine, for end-to-end checks and screenshots.

Everything is in one folder (``PREFECT_HOME``, logs) and on a free port of the loopback interface, so the user's own
Prefect is not affected. Processes can be killed and restarted, with the same address and database.

    with Stack(folder) as stack:
        stack.start_server()
        stack.create_pool("mlorq", "process")
        stack.deploy()
        stack.start_worker("mlorq")
        run = stack.run("compress/compress", {"config": …})
        stack.wait(run)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


class Stack:
    """A server and its workers.

    Args:
        folder: for the server's database, the logs and the workers' homes.
        ui: whether the server shows its pages.
    """

    def __init__(self, folder: Path, *, ui: bool = False) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_ENABLED": str(ui).lower(),
            "PREFECT_LOGGING_LEVEL": "INFO",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_WAIT_POLICY": "PASSIVE",
            "NO_PROXY": "127.0.0.1,localhost",
            # The runs are the script's own; docs/SECURITY.md.
            "MLORQ_ROOTS": "*",
            "MLORQ_ALLOWED_FACTORIES": "*",
            "MLORQ_ALLOWED_IMAGES": "*",
            "MLORQ_ALLOWED_ARGUMENTS": "model.arguments.weights",
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self._client = httpx.Client(base_url=self.url, timeout=120.0, trust_env=False)

    def __enter__(self) -> Stack:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._processes)):
            self.kill(name)
        self._client.close()
        for log in self._logs:
            log.close()

    # -- processes --------------------------------------------------------------------------------------------

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process in its own session, with its output in ``<folder>/<name>.log``."""
        log = (self.folder / f"{name}.log").open("ab")
        self._logs.append(log)
        self._processes[name] = process = subprocess.Popen(
            command,
            env=self.environment | environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Background jobs of a shell ignore SIGINT, and children inherit that: a worker would never end on SIGTERM,
            # which Prefect translates to SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return process

    def kill(self, name: str, sign: signal.Signals = signal.SIGKILL) -> None:
        """End a process; with ``SIGKILL`` also its descendants, which would otherwise keep running as orphans."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        targets = [process.pid, *_descendants(process.pid)] if sign == signal.SIGKILL else [process.pid]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        process.wait(timeout=30)

    def log(self, name: str) -> str:
        """Output of a process."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start_server(self) -> None:
        """Start or restart the server, and wait until it answers."""
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self.start("server", sys.executable, "-m", "prefect", "server", "start", *address)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self._processes["server"].poll() is not None:
                break
            try:
                if self._client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server has not started:\n{self.log('server')[-4000:]}")

    def start_worker(self, pool: str, kind: str = "process", **environment: str) -> str:
        """Start a worker of a pool; returns the name of its process."""
        name = f"worker-{pool}-{uuid.uuid4().hex[:6]}"
        self.start(
            name, sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", kind, "--name", name,
            **{"PREFECT_WORKER_QUERY_SECONDS": "2", **environment},
        )  # fmt: skip
        return name

    def kill_workers(self) -> None:
        """Kill the running workers and their descendants."""
        for name in [name for name in self._processes if name.startswith("worker-")]:
            self.kill(name)

    def prefect(self, *arguments: str, **environment: str) -> str:
        """Run a command of Prefect's command line in the repository; returns its output."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.environment | environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"prefect {' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def create_pool(self, name: str, kind: str) -> None:
        """Create a work pool."""
        self.prefect("work-pool", "create", name, "--type", kind, "--overwrite")

    def deploy(self, *names: str) -> None:
        """Deploy all deployments of ``prefect.yaml``, or those named."""
        chosen = [item for name in names for item in ("--name", name)] or ["--all"]
        self.prefect("deploy", *chosen)

    # -- the server's interface -------------------------------------------------------------------------------

    def call(self, method: str, path: str, json: Any = None) -> Any:
        """Send one request to the server; returns its JSON answer."""
        deadline = time.monotonic() + 30
        answer = self._client.request(method, path, json=json)
        # A server that has just started, or waits for its database, answers 503.
        while answer.status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.5)
            answer = self._client.request(method, path, json=json)
        if answer.is_error:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:2000]}")
        return answer.json() if answer.content else None

    def run(self, deployment: str, parameters: dict[str, Any], job_variables: dict[str, Any] | None = None) -> str:
        """Start a run of a deployment, ``flow/deployment``; returns the run's id."""
        found = self.call("GET", f"/deployments/name/{deployment}")
        body = {"parameters": parameters, "job_variables": job_variables or {}}
        created = self.call("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return str(created["id"])

    def change_job_variables(self, deployment: str, job_variables: dict[str, Any]) -> None:
        """Change job variables of a deployment, ``flow/deployment``; the other variables are kept."""
        found = self.call("GET", f"/deployments/name/{deployment}")
        body = {"job_variables": {**found["job_variables"], **job_variables}}
        self.call("PATCH", f"/deployments/{found['id']}", body)

    def flow_run(self, run: str) -> dict[str, Any]:
        """A flow run."""
        found: dict[str, Any] = self.call("GET", f"/flow_runs/{run}")
        return found

    def flow_runs(self, **name: list[str]) -> list[dict[str, Any]]:
        """Flow runs of flows by name (``any_=["rebudget"]``), oldest first."""
        query = {"flows": {"name": name}, "sort": "START_TIME_ASC", "limit": 100}
        return list(self.call("POST", "/flow_runs/filter", query))

    def wait(self, run: str, seconds: float = 300.0, state: str = "COMPLETED") -> dict[str, Any]:
        """Wait until a run has ended in the given state.

        Raises:
            RuntimeError: it ended in another state, or not in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.flow_run(run)
            if found["state_type"] in FINAL:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"run {found['name']} is {found['state_name']} after {seconds:.0f} s")
            time.sleep(0.5)
        if found["state_type"] != state:
            message = found["state"].get("message")
            raise RuntimeError(f"run {found['name']} is {found['state_name']}: {message}\n{self.run_log(run)[-4000:]}")
        return found

    def run_log(self, run: str) -> str:
        """Log of a run, from the server."""
        query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(str(line["message"]) for line in self.call("POST", "/logs/filter", query))

    def task_states(self, run: str, expected: int = 0, seconds: float = 30.0) -> Counter[str]:
        """Task runs of a flow run by state; waits until ``expected`` of them have ended, as the server knows."""
        deadline = time.monotonic() + seconds
        while True:
            query = {"flow_runs": {"id": {"any_": [run]}}, "limit": 200}
            found = [item["state_name"] for item in self.call("POST", "/task_runs/filter", query)]
            ended = [state for state in found if state not in ("Pending", "Running")]
            if len(ended) >= expected or time.monotonic() > deadline:
                return Counter(found)
            time.sleep(0.3)

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """Artifacts of a run by key."""
        query = {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return {item["key"]: item for item in self.call("POST", "/artifacts/filter", query)}

    def emit(self, event: str, resource: str, payload: dict[str, Any]) -> None:
        """Send an event, as a user's software would."""
        body = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": event,
            "resource": {"prefect.resource.id": resource},
            "related": [],
            "payload": payload,
        }
        self.call("POST", "/events", [body])


def _descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in found.splitlines())}
    known = {pid}
    while more := {child for child, parent in parents.items() if parent in known} - known:
        known |= more
    return sorted(known - {pid})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
