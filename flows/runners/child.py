"""Steps in a child process of the flow, one process per device, which sees that device only.

The steps' use of the interpreter lock, CUDA contexts and memory leaks do not affect the flow. The child is
``python -m steps --serve``: it imports torch and loads model and data once, and runs one step after another. It starts
with the first step and, if it is lost, again with the next.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import IO, Any

from flows.runners.base import POLL_SECONDS, Watch
from mlorq.config.run import RunConfig
from mlorq.errors import TransientError
from steps.base import Outcome, StepSpec
from steps.protocol import Description, outcome_of, reject_memory_store

LAST_LINES = 20  # of the output of a lost process, for the error message


class ChildRunner:
    """Runs steps in a child process.

    Args:
        config: of the run.
        device: ``cpu``, ``cuda:0`` …, numbered as in this process.

    Raises:
        StoreError: the store is in memory.
    """

    def __init__(self, config: RunConfig, device: str) -> None:
        reject_memory_store(config)
        self.config = config
        self.device = device
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._watch: Watch | None = None
        self._pending: list[str] = []  # lines received while no step was running
        self._lock = threading.Lock()
        self._busy = False
        self._listener: threading.Thread | None = None

    @property
    def place(self) -> str:
        """The device, in a child process."""
        return f"{self.device} in a child process"

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step in the child."""
        with self._lock:
            self._watch, pending, self._pending = watch, self._pending, []
        for text in pending:
            watch.log(text)
        inside = "cpu" if self.device == "cpu" else "cuda:0"  # the only device of the child
        # In the URI itself: a file would be left behind if this process were killed.
        content = base64.b64encode(Description(spec, self.config, inside).to_bytes()).decode()
        request = {"name": spec.step, "spec": f"data:application/json;base64,{content}"}
        try:
            return outcome_of(self._ask(request, spec.label, watch), spec.label)
        except BaseException:
            if self._busy:
                self.close()  # interrupted: its step is no longer needed
            raise
        finally:
            with self._lock:
                self._watch = None

    def _ask(self, request: dict[str, Any], label: str, watch: Watch) -> dict[str, Any]:
        """Send a request and handle its events; returns the last one."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        self._busy = True
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the end of its output shows
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                watch.check()
                continue
            if line is None:
                raise TransientError(f"{label}: its process {self._exit_reason(process)}")
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "progress":
                watch.progress(event["done"], event["total"])
                continue
            self._busy = False
            return event

    def _start(self) -> subprocess.Popen[str]:
        self._lines, self._last_lines = queue.SimpleQueue(), deque(maxlen=LAST_LINES)
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "steps", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(self.device, self.config.engine.threads),
            start_new_session=True,  # Ctrl-C interrupts the flow only, which then ends the child
        )
        assert process.stdout is not None
        assert process.stderr is not None
        threading.Thread(target=_pass_on, args=(process.stdout, self._lines), daemon=True).start()
        self._listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        self._listener.start()
        return process

    def _listen(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                text = line.rstrip()
                self._last_lines.append(text)
                with self._lock:
                    watch = self._watch
                    if watch is None and text:
                        self._pending.append(text)
                if watch is not None and text:
                    watch.log(text)

    def _exit_reason(self, process: subprocess.Popen[str]) -> str:
        status = process.wait()
        if self._listener is not None:
            self._listener.join(timeout=1.0)  # for its last lines; a grandchild may keep the pipe open
        lines = "".join(f"\n  {line}" for line in self._last_lines)
        if status < 0:
            name = signal.Signals(-status).name
            why = " (out of memory?)" if -status == signal.SIGKILL else ""
            return f"was ended by {name}{why}{lines}"
        return f"ended with status {status}{lines}"

    def close(self) -> None:
        """End the child at once: the store is always consistent."""
        process, self._process = self._process, None
        self._busy = False
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with processes that user code may have started
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _pass_on(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def child_environment(device: str, threads: int | None) -> dict[str, str]:
    """The environment of a process that may use one device.

    Args:
        device: ``cpu`` or ``cuda:N``, numbered as in this process.
        threads: CPU threads; None: torch's default.
    """
    environment = dict(os.environ)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = environment.get("PYTHONPATH")
    # If the packages are used from a checkout, the child imports the same ones.
    environment["PYTHONPATH"] = root if not path else os.pathsep.join((root, path))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        index = int(device.partition(":")[2] or 0)
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
