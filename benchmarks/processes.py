"""Time and memory of a run's processes, phase by phase: of the flow, and of the workers that it started."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from steps.base import Outcome, StepSpec

TICKS = os.sysconf("SC_CLK_TCK")
SERVER = "flows.server"  # the Prefect server of a command, which is no worker


def reset_peak(process: int | str = "self") -> None:
    """Let the peak of a process begin at what it holds at present."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def resident(what: str, process: int | str = "self") -> int:
    """Bytes of a process in memory: ``VmRSS``, at present; ``VmHWM``, at most; 0 for one that has ended."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * int(lines.get(what, "0").split()[0])


def cpu_seconds(process: int | str = "self") -> float:
    """CPU seconds of a process since it started."""
    values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / TICKS


def workers() -> list[int]:
    """The processes that this one started, directly or not, without its Prefect server."""
    parents: dict[int, int] = {}
    servers = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if SERVER in (path / "cmdline").read_text():
                servers.add(int(path.name))
    known = {os.getpid()}
    while more := {one for one, parent in parents.items() if parent in known and one not in servers} - known:
        known |= more
    return sorted(known - {os.getpid()})


@dataclass
class Use:
    """What the phases of one name took.

    Attributes:
        wall: seconds.
        cpu: CPU seconds of the flow and of all workers.
        peak: most bytes in memory of a worker.
        flow_peak: most bytes in memory of the flow's process.
    """

    wall: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    flow_peak: int = 0


@dataclass
class Meter:
    """Measures the phases of a run: an observer (``flows.progress``).

    Attributes:
        phases: figures by name of the phase.
        work: seconds that steps took as they measure it themselves, by name of the step.
    """

    phases: dict[str, Use] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    _name: str | None = None
    _started: float = 0.0
    _before: dict[int, float] = field(default_factory=dict)

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """The phase before it ends, and this one begins."""
        self.close()
        self._name, self._started = name, time.perf_counter()
        self._before = {}
        for process in [os.getpid(), *workers()]:
            with contextlib.suppress(OSError):  # it has ended
                reset_peak(process)
                self._before[process] = cpu_seconds(process)

    def close(self) -> None:
        """The present phase ends."""
        if self._name is None:
            return
        use = self.phases.setdefault(self._name, Use())
        use.wall += time.perf_counter() - self._started
        use.flow_peak = max(use.flow_peak, resident("VmHWM"))
        use.cpu += cpu_seconds() - self._before[os.getpid()]
        for process in workers():
            with contextlib.suppress(OSError):
                use.peak = max(use.peak, resident("VmHWM", process))
                use.cpu += cpu_seconds(process) - self._before.get(process, 0.0)
        self._name = None

    def step_started(self, spec: StepSpec) -> None:
        """Not measured."""

    def step_progress(self, spec: StepSpec, done: int, total: int) -> None:
        """Not measured."""

    def step_finished(self, spec: StepSpec, outcome: Outcome) -> None:
        """Adds its own seconds, if it was computed."""
        if not outcome.reused:
            self.work[spec.step] = self.work.get(spec.step, 0.0) + outcome.seconds

    def step_failed(self, spec: StepSpec) -> None:
        """Not measured."""
