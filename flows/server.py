"""The Prefect server that records a run: the configured one, or an embedded one that lives as long as the command.

Prefect can start a temporary server itself, but that server starts late (after the model is loaded, not in parallel),
is killed by Ctrl-C before it can record that the run was interrupted, survives a ``kill -9`` of the command, loses the
last task states when it is stopped, and prints to the terminal. The embedded server starts early, in its own session,
watches its parent, and is stopped only after everything is recorded. It uses the user's Prefect database, so
``prefect server start`` shows the runs later.

``python -m flows.server FD PARENT`` is the server process: it serves on an inherited listening socket.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any

from flows.verbosity import verbosity
from mlorq.errors import ConfigError

START_SECONDS = 180.0  # for a busy machine that migrates a new database; usually 5
RECORD_SECONDS = 20.0

# For Prefect in this process; variables that the user has set take precedence.
CLIENT_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_SECONDS)),
    # After 2, 4, … 128 s a request is given up instead of after 32 s. The servers of eight runs that start at the same
    # time share a database, in which SQLite lets one of them write.
    "PREFECT_CLIENT_MAX_RETRIES": "7",
}
# For the server, which has one client and one run: no schedules, and none of the user's automations.
SERVER_DEFAULTS = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    # One database transaction per batch of task states instead of one per state saves 5 s for 150 steps. The server
    # truncates the interval to whole seconds; with 0 it would never sleep.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}


WORKERS_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
_EMBEDDED = threading.Event()


def embedded() -> bool:
    """Whether the Prefect server of this process ends with its command."""
    return _EMBEDDED.is_set()


def refusal(error: BaseException) -> str | None:
    """One line about a request that the Prefect server could not answer, even when repeated; None of another error."""
    if "prefect.exceptions" not in sys.modules:
        return None
    from prefect.exceptions import PrefectHTTPStatusError

    if not isinstance(error, PrefectHTTPStatusError) or error.response.status_code < 500:
        return None if error.__cause__ is None else refusal(error.__cause__)
    status, path = error.response.status_code, error.request.url.path
    return (
        f"the Prefect server answered {status} to {error.request.method} {path}: it, or its database, is overloaded; "
        "run the same command again to resume"
    )


class PrefectSession:
    """A Prefect server for the duration of a command.

    Entering starts the embedded server, unless another one is configured, without waiting for it; ``ready`` waits.

        with PrefectSession() as session:
            …                               # load the model in the meantime
            session.ready()
            compress_flow(…)

    The terminal shows as much of Prefect's log as the command asks for (``flows.verbosity``).
    """

    def __init__(self) -> None:
        self._expected: dict[str, int] = {}
        self._answers = False
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._url: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> PrefectSession:
        for name, value in CLIENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        import prefect.main  # noqa: F401  (sets up logging)
        from prefect.settings import PREFECT_API_URL

        shown = verbosity()
        if not shown.prefect_log:
            level = logging.ERROR if shown.quiet else logging.WARNING
            _quieten(level)
            if WORKERS_LEVEL not in os.environ:  # Dask's workers are processes with a log of their own
                os.environ[WORKERS_LEVEL] = logging.getLevelName(level)
                self._stack.callback(os.environ.pop, WORKERS_LEVEL, None)
        if PREFECT_API_URL.value() is None:
            self._start()
        return self

    def ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ConfigError: the configured server does not answer.
        """
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        if self._process is not None:
            self._wait()
            self._answers = True
            _EMBEDDED.set()
            self._stack.callback(_EMBEDDED.clear)
            self._stack.enter_context(temporary_settings({PREFECT_API_URL: self._url}))
            return
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        if error is not None:
            raise ConfigError(
                f"the Prefect server at {PREFECT_API_URL.value()} does not answer ({error}); "
                "start it, or unset PREFECT_API_URL to run without one"
            )

    def expect(self, flow_run: str, task_runs: int) -> None:
        """Set the number of task runs of a flow run that the server must have recorded before it is stopped."""
        self._expected[flow_run] = task_runs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._answers and self._process is not None and self._process.poll() is None:
                # After Ctrl-C the user is waiting: a shorter limit.
                self._settle(RECORD_SECONDS if kind is None else RECORD_SECONDS / 10)
        finally:
            self._stack.close()
            self._stop()

    # -- the embedded server ----------------------------------------------------------------------------------

    def _start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}/api"
        environment = {**SERVER_DEFAULTS, **os.environ}
        environment.pop("PREFECT_API_URL", None)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in _stop)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listener.fileno()), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        )
        listener.close()

    def _wait(self) -> None:
        import httpx

        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the embedded Prefect server ended with status {self._process.returncode}:\n{self._log_tail()}"
                )
            try:
                # The socket is listening already: the server answers as soon as it has started.
                if httpx.get(f"{self._url}/health", timeout=1.0, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                continue
            time.sleep(0.05)
        raise RuntimeError(
            f"the embedded Prefect server has not started after {START_SECONDS:.0f} s:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]

    def _settle(self, seconds: float) -> None:
        """Wait until logs and task states are recorded: the server processes them asynchronously."""
        from prefect.client.orchestration import get_client
        from prefect.logging.handlers import APILogHandler

        APILogHandler().flush()
        deadline = time.monotonic() + seconds
        final = ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]
        with get_client(sync_client=True) as client:
            for flow_run, expected in self._expected.items():
                query = {"flow_run_id": {"any_": [flow_run]}, "state": {"type": {"any_": final}}}
                while time.monotonic() < deadline:
                    if client.request("POST", "/task_runs/count", json={"task_runs": query}).json() >= expected:
                        break
                    time.sleep(0.1)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()


class _Quiet(logging.Filter):
    """Hides Prefect's log of a run in the terminal: the command shows its own progress.

    Args:
        level: least level of the other lines that are shown.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.level and not record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))


def _quieten(level: int) -> None:
    from prefect.logging.handlers import PrefectConsoleHandler

    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler) and not any(isinstance(f, _Quiet) for f in handler.filters):
            handler.addFilter(_Quiet(level))


def serve(descriptor: int, parent: int) -> None:
    """Run a Prefect server on an inherited socket until it is stopped or its parent has ended."""
    import uvicorn

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    options: dict[str, Any] = {"factory": True, "log_level": "error", "lifespan": "on"}
    config = uvicorn.Config("prefect.server.api.server:create_app", **options)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
