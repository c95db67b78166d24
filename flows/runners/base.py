"""Interfaces of runners: a runner runs steps on one device, with results that do not depend on the runner."""

from __future__ import annotations

from typing import Any, Protocol

from steps.base import Outcome, StepSpec

POLL_SECONDS = 0.5  # interval at which a runner that waits for another process checks whether the run is over


class Watch(Protocol):
    """Callbacks of a running step."""

    def progress(self, done: int, total: int) -> None:
        """The step has completed ``done`` of ``total`` units. Raises if the run is over."""

    def check(self) -> None:
        """Raise if the run is over."""

    def log(self, line: str) -> None:
        """A line that the step's process wrote."""


class LogOnly:
    """A watch that ignores progress.

    Args:
        log: logger that receives the lines of a step's process as debug messages.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def progress(self, done: int, total: int) -> None:
        """Ignored."""

    def check(self) -> None:
        """Never raises."""

    def log(self, line: str) -> None:
        """A line that the step's process wrote."""
        self._log.debug("%s", line)


class Runner(Protocol):
    """Runs steps, one at a time."""

    @property
    def device(self) -> str:
        """The device of its steps: ``cpu``, ``cuda:0`` …"""

    @property
    def place(self) -> str:
        """Where steps run, for display: ``cuda:1``, ``cuda:1 in a child process``."""

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step unless the store has its artifact. If it ends early, its process is ended as well.

        Raises:
            MlorqError: of the step.
            TransientError: its process or container was lost.
        """

    def close(self) -> None:
        """Release processes and memory; the runner can be used again."""
