"""Progress of a run: one line per phase in the terminal, and one progress artifact per long phase in Prefect.

An executor notifies an observer, which can pass everything on to several. The progress and the remaining time of a
phase are kept in a ``Phase``: a finished step counts as one, a running step as the fraction that it reports, and the
remaining time is extrapolated from computed steps only, not from reused ones.
"""

from __future__ import annotations

import contextvars
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Protocol, cast
from uuid import UUID

from flows.verbosity import verbosity

if TYPE_CHECKING:
    from steps.base import Outcome, StepSpec

LOGGER = logging.getLogger(__name__)
UPDATE_SECONDS = 1.0  # minimum interval between updates of a progress artifact
CLOSE_SECONDS = 30.0  # at most, for the last updates: a busy server answers late
LAST_TRIES = 3  # to send the last state
LONG_PHASES = frozenset(("capture", "candidates", "sensitivity", "round", "tune", "export"))  # with a progress artifact
LINE_SECONDS = 10.0  # interval of plain lines about a running step


class Observer(Protocol):
    """Receives the notifications of an executor, from any thread."""

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """The next phase, ``total`` steps of one kind, begins; the previous one is over.

        Args:
            name: of the steps.
            total: number of steps.
            budget: that they are of; empty: the steps are of all budgets.
        """

    def step_started(self, spec: StepSpec) -> None:
        """A step has started."""

    def step_progress(self, spec: StepSpec, done: int, total: int) -> None:
        """A running step has completed ``done`` of ``total`` units."""

    def step_finished(self, spec: StepSpec, outcome: Outcome) -> None:
        """A step has finished, computed or reused."""

    def step_failed(self, spec: StepSpec) -> None:
        """A step has failed."""

    def close(self) -> None:
        """The run is over, successfully or not."""


@dataclass
class Phase:
    """Progress of one phase.

    Attributes:
        name: of its steps.
        total: number of steps.
        clock: gives the time in seconds.
        computed, reused: number of finished steps.
        running: completed fraction of every running step, by key.
        labels: names of the running steps, by key.
        first_work: time at which the first computed step started, by ``clock``; None before.
        failed: number of failed steps.
        started: time at which the phase began, by ``clock``.
        budget: of its steps; empty: of all budgets.
    """

    name: str
    total: int
    clock: Callable[[], float] = time.monotonic
    budget: str = ""
    computed: int = 0
    reused: int = 0
    failed: int = 0
    running: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    first_work: float | None = None
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def done(self) -> int:
        """Steps finished."""
        return self.computed + self.reused

    @property
    def share(self) -> float:
        """Completed fraction of the phase, running steps included, 0 to 1."""
        return min(1.0, (self.done + sum(self.running.values())) / max(1, self.total))

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return self.clock() - self.started

    @property
    def left(self) -> float | None:
        """Remaining seconds, extrapolated from the steps computed so far; None if too little is computed."""
        if self.first_work is None:
            return None
        worked = self.computed + sum(self.running.values())
        if worked < 0.05:
            return None
        remaining = self.total - self.done - sum(self.running.values())
        return (self.clock() - self.first_work) / worked * max(0.0, remaining)

    @property
    def current(self) -> str:
        """Names of the running steps."""
        return ", ".join(self.labels.values())

    def begin(self, spec: StepSpec) -> None:
        """A step has started."""
        if self.first_work is None:
            self.first_work = self.clock()
        self.running[spec.key] = 0.0
        self.labels[spec.key] = spec.layer or ""

    def advance(self, spec: StepSpec, done: int, total: int) -> None:
        """A running step has completed ``done`` of ``total`` units."""
        if spec.key in self.running:
            self.running[spec.key] = min(1.0, done / max(1, total))

    def end(self, spec: StepSpec, outcome: Outcome | None) -> None:
        """A step has ended; without an outcome, it failed."""
        self.running.pop(spec.key, None)
        self.labels.pop(spec.key, None)
        if outcome is None:
            self.failed += 1
        else:
            self.reused += outcome.reused
            self.computed += not outcome.reused


class _PhaseObserver:
    """Keeps the current phase; subclasses display it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._phase: Phase | None = None

    def phase(self, name: str, total: int, budget: str = "") -> None:
        with self._lock:
            self._end_phase()
            self._phase = Phase(name, total, budget=budget)
            self._begin_phase(self._phase)

    def step_started(self, spec: StepSpec) -> None:
        with self._lock:
            if self._phase is not None:
                self._phase.begin(spec)
                self._changed(self._phase)

    def step_progress(self, spec: StepSpec, done: int, total: int) -> None:
        with self._lock:
            if self._phase is not None:
                self._phase.advance(spec, done, total)
                self._changed(self._phase)

    def step_finished(self, spec: StepSpec, outcome: Outcome) -> None:
        with self._lock:
            if self._phase is not None:
                self._phase.end(spec, outcome)
                self._finished(self._phase, spec, outcome)
                self._changed(self._phase)

    def step_failed(self, spec: StepSpec) -> None:
        with self._lock:
            if self._phase is not None:
                self._phase.end(spec, None)
                self._changed(self._phase)

    def close(self) -> None:
        with self._lock:
            self._end_phase()
            self._phase = None

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._over(self._phase)

    def _begin_phase(self, phase: Phase) -> None: ...

    def _changed(self, phase: Phase) -> None: ...

    def _finished(self, phase: Phase, spec: StepSpec, outcome: Outcome) -> None: ...

    def _over(self, phase: Phase) -> None: ...


# -- terminal -------------------------------------------------------------------------------------------------


class PlainProgress(_PhaseObserver):
    """Lines on a stream other than a terminal: one per computed step, one per phase for all reused steps.

    A running step is reported every ``LINE_SECONDS``.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._last = time.monotonic()

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, file=self._stream, flush=True)

    def _begin_phase(self, phase: Phase) -> None:
        self._last = time.monotonic()

    def _finished(self, phase: Phase, spec: StepSpec, outcome: Outcome) -> None:
        if not outcome.reused:
            layer = f"  {spec.layer}" if spec.layer else ""
            left = f"  ({format_seconds(phase.left)} left)" if phase.left and phase.done < phase.total else ""
            self._say(f"{phase.name} {phase.done}/{phase.total}{layer}  {format_seconds(outcome.seconds)}{left}")

    def _changed(self, phase: Phase) -> None:
        if phase.running and time.monotonic() - self._last >= LINE_SECONDS:
            left = f", {format_seconds(phase.left)} left" if phase.left is not None else ""
            share = sum(phase.running.values()) / len(phase.running)
            self._say(f"{phase.name} {phase.done}/{phase.total}  {phase.current}  {share:.0%}{left}".rstrip())

    def _over(self, phase: Phase) -> None:
        if phase.reused:
            self._say(f"{phase.name}: {phase.reused} of {phase.total} reused")


class RichProgress(_PhaseObserver):
    """One live line per phase, on a terminal."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        class Times(ProgressColumn):
            def render(self, task: Task) -> Text:
                phase: Phase = task.fields["phase"]
                seconds = phase.elapsed if not task.finished else task.fields["took"]
                left = "" if task.finished or phase.left is None else f", {format_seconds(phase.left)} left"
                return Text(f"{format_seconds(seconds)}{left}", style="cyan")

        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            Times(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=Console(file=stream or sys.stderr),
            refresh_per_second=5,
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._task: Any = None

    def _begin_phase(self, phase: Phase) -> None:
        if self._task is None:
            self._progress.start()
        self._task = self._progress.add_task(
            phase.name, total=phase.total, phase=phase, count=f"0/{phase.total}", detail="", took=0.0
        )

    def _changed(self, phase: Phase) -> None:
        self._progress.update(
            self._task,
            # Below 100 % until the last step has ended: Rich treats a full bar as finished.
            completed=min(phase.share, 0.999 if phase.done < phase.total else 1.0) * phase.total,
            count=f"{phase.done}/{phase.total}",
            detail=phase.current,
            took=phase.elapsed,
        )

    def _over(self, phase: Phase) -> None:
        detail = f"{phase.reused} reused" if phase.reused else ""
        self._progress.update(self._task, detail=detail, took=phase.elapsed)

    def close(self) -> None:
        super().close()
        self._progress.stop()


def terminal_progress(stream: IO[str] | None = None) -> Observer:
    """The observer that fits a stream (default: standard error); none of a quiet command shows anything."""
    if verbosity().quiet:
        return Observers([])
    stream = stream or sys.stderr
    return RichProgress(stream) if stream.isatty() else PlainProgress(stream)


def format_seconds(seconds: float | None) -> str:
    """``0.4s``, ``12s``, ``3m05s``, ``2h07m``."""
    if seconds is None:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


# -- Prefect --------------------------------------------------------------------------------------------------


@dataclass
class _Page:
    """The progress artifact of a phase.

    Attributes:
        phase: the phase; it still changes unless ``over``.
        over: whether the phase has ended.
        artifact: id of the artifact; None before it is created.
        written: percentage and description that the server has.
    """

    phase: Phase
    over: bool = False
    artifact: UUID | None = None
    written: tuple[float, str] | None = None


class PrefectProgress(_PhaseObserver):
    """One progress artifact per phase that can take long, named after it and its budget: ``round-3bit``.

    A phase of which every step is reused has none. Only one thread sends, about once per second, so that the last state
    wins; ``close`` waits until the last one is sent. It must be created and closed inside a flow run. Errors of Prefect
    are only logged: the run continues.

    Args:
        model: its short name, for the artifacts' descriptions.
        budgets: of the run.
    """

    def __init__(self, model: str, budgets: Sequence[str]) -> None:
        super().__init__()
        self._model = model
        self._budgets = " ".join(budgets)
        self._pages: list[_Page] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def _begin_phase(self, phase: Phase) -> None:
        if phase.name not in LONG_PHASES:
            return
        self._pages.append(_Page(phase))
        if self._thread is None:
            # With the flow's context, which holds the server that Prefect uses.
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._send_often,), daemon=True)
            self._thread.start()

    def _over(self, phase: Phase) -> None:
        for page in self._pages:
            page.over |= page.phase is phase

    def close(self) -> None:
        super().close()
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_SECONDS)

    def _send_often(self) -> None:
        while not self._closing.wait(UPDATE_SECONDS):
            self._send_all()
        for _ in range(LAST_TRIES):
            if self._send_all():
                return
            time.sleep(UPDATE_SECONDS)

    def _send_all(self) -> bool:
        """Send what has changed, in one thread only; returns whether the server has all of it."""
        sent = True
        with self._lock:
            states = [
                (page, page.over, self._news(page.phase)) for page in self._pages if page.phase.first_work is not None
            ]
        for page, over, news in states:
            try:
                if news != page.written:
                    self._send(page, news)
            except Exception as error:
                LOGGER.debug("progress artifact of %s not updated: %r", page.phase.name, error)
                sent = False
                continue  # the next call tries again
            if over:
                with self._lock:
                    self._pages.remove(page)
        return sent

    def _send(self, page: _Page, news: tuple[float, str]) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        share, description = news
        if page.artifact is None:
            key = re.sub("[^a-z0-9]+", "-", f"{page.phase.name} {page.phase.budget}".lower()).strip("-")
            page.artifact = cast(UUID, create_progress_artifact(share, key=key, description=description))
        else:
            update_progress_artifact(page.artifact, share, description)
        page.written = news

    def _news(self, phase: Phase) -> tuple[float, str]:
        """Percentage and description of a phase."""
        reused = f", {phase.reused} reused" if phase.reused else ""
        failed = f", {phase.failed} failed" if phase.failed else ""
        subject = f"{self._model} {phase.budget or self._budgets}"
        return round(100 * phase.share, 1), f"{subject}: {phase.name} {phase.done}/{phase.total}{reused}{failed}"


class Observers:
    """Passes all notifications on to several observers."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self.members = list(members)

    def phase(self, name: str, total: int, budget: str = "") -> None:
        for member in self.members:
            member.phase(name, total, budget)

    def step_started(self, spec: StepSpec) -> None:
        for member in self.members:
            member.step_started(spec)

    def step_progress(self, spec: StepSpec, done: int, total: int) -> None:
        for member in self.members:
            member.step_progress(spec, done, total)

    def step_finished(self, spec: StepSpec, outcome: Outcome) -> None:
        for member in self.members:
            member.step_finished(spec, outcome)

    def step_failed(self, spec: StepSpec) -> None:
        for member in self.members:
            member.step_failed(spec)

    def close(self) -> None:
        for member in self.members:
            member.close()
