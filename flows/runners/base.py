"""What a runner is: it carries steps out on one device, wherever that is, with the same artifact under the same key."""

from __future__ import annotations

from typing import Any, Protocol

from steps.base import Outcome, StepSpec

POLL_SECONDS = 0.5  # how often a runner that waits for another process asks whether the run goes on


class Watch(Protocol):
    """What a runner tells while a step runs, and asks."""

    def progress(self, done: int, total: int) -> None:
        """The step has done ``done`` of ``total`` units. Raises where the run is over."""

    def check(self) -> None:
        """Raises where the run is over."""

    def log(self, line: str) -> None:
        """A line that the step's process wrote."""


class LogOnly:
    """A watch for those who hear of a step when it is over.

    Args:
        log: gets the lines that a step's process writes, as debugging messages.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def progress(self, done: int, total: int) -> None:
        """Nobody asks."""

    def check(self) -> None:
        """The run goes on."""

    def log(self, line: str) -> None:
        """A line that the step's process wrote."""
        self._log.debug("%s", line)


class Runner(Protocol):
    """Carries steps out, one at a time."""

    @property
    def place(self) -> str:
        """Where steps run, for people: ``cuda:1``, ``cuda:1 in a child process``."""

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step unless its artifact is there. Whatever ends it early, nothing of it goes on running.

        Raises:
            MlorqError: the step's own.
            TransientError: its process or container was lost.
        """

    def close(self) -> None:
        """Let go of processes and memory; the runner may be used again."""
