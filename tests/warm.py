"""Processes that start in milliseconds: forked from one that has imported all that a run imports.

    with Warm(folder) as warm:
        process = warm.start("flows.cli:main", ["compress", "run.yaml", "--json"])
        process.send(signal.SIGKILL)
        process.wait()

Two hundred runs that each import torch and Prefect would take an hour. The first process runs a call once in a child,
which tells what was imported, and imports the same; it starts no thread, which would be missing in its children.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


class Process:
    """A forked process in a session of its own.

    Attributes:
        pid: its number, also that of its session.
        status: as of ``subprocess.Popen.returncode``; None while it runs.
    """

    def __init__(self, warm: Warm, pid: int, folder: Path) -> None:
        self.pid = pid
        self.status: int | None = None
        self._warm = warm
        self._folder = folder

    @property
    def out(self) -> str:
        """What it wrote to standard output."""
        return (self._folder / f"{self.pid}.out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it wrote to standard error."""
        return (self._folder / f"{self.pid}.err").read_text(errors="replace")

    def send(self, sign: signal.Signals) -> bool:
        """Send it a signal; whether it was still running."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, sign)  # a number stays taken until it is waited for
        return True

    def poll(self) -> int | None:
        """Its status, if it has ended."""
        if self.status is None:
            self.status = self._warm.ask({"poll": self.pid})
        return self.status

    def wait(self, seconds: float = 300) -> int:
        """Its status at its end; a process that does not end is killed, and that is an error."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"process {self.pid} still runs after {seconds} s:\n{self.err[-4000:]}")
            time.sleep(0.01)
        return status


class Warm:
    """The process that is forked.

    Args:
        folder: for the outputs of processes.
        first: a call (function, arguments) whose imports are made beforehand; it must succeed.
        environment: variables of all processes.
    """

    def __init__(
        self, folder: Path, first: tuple[str, Sequence[Any]], environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(environment or {})}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **variables},
        )
        self._running: list[Process] = []
        try:
            process = self.start("tests.warm:tell_imports", [str(folder / "imports.json"), *first])
            assert process.wait(600) == 0, process.err
            self.ask({"import": str(folder / "imports.json")})
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            if process.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def start(self, function: str, arguments: Sequence[Any], **environment: str) -> Process:
        """Call ``module:function`` with arguments in a new process, which ends with what it returns."""
        pid = self.ask({"call": function, "arguments": list(arguments), "environment": environment})
        self._running.append(Process(self, pid, self.folder))
        return self._running[-1]

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer of the first process to a request."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._lock:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return json.loads(self._server.stdout.readline())


def tell_imports(path: str, function: str, arguments: Sequence[Any]) -> int:
    """Make a call, and write the names of all modules that are loaded after it."""
    status = _resolve(function)(arguments)
    Path(path).write_text(json.dumps([name for name in sys.modules if not name.startswith("__")]))
    return int(status)


def _resolve(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _import_all(path: str) -> None:
    names = json.loads(Path(path).read_text())
    for name in names:
        # Names that are not modules by themselves, and those that only exist beside another.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _answer(out: int, value: Any) -> None:
    os.write(out, json.dumps(value).encode() + b"\n")


def serve(folder: Path) -> int:
    """Answer requests; in a forked process, make the call."""
    out = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            _import_all(request["import"])
            _answer(out, len(sys.modules))
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            _answer(out, os.waitstatus_to_exitcode(status) if pid else None)
        else:
            pid = os.fork()
            if pid == 0:
                os.close(out)
                return _become(folder, request)
            _answer(out, pid)
    return 0


def _become(folder: Path, request: dict[str, Any]) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["environment"])
    if "fsspec.config" in sys.modules:  # which has read the environment before
        config = sys.modules["fsspec.config"]
        config.set_conf_env(config.conf)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    arguments = request["arguments"]
    if request["call"].startswith("tests.warm:"):
        return int(_resolve(request["call"])(*arguments))
    return int(_resolve(request["call"])(arguments))


if __name__ == "__main__":
    try:
        code = serve(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.exit(code)
