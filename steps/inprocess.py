"""The simplest executor: every step is a call in this process, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steps.base import Outcome, StepSpec, execute
from steps.progress_line import ProgressLine
from steps.session import Session


class InProcess:
    """Runs steps on the first worker of a run.

    Args:
        session: of the run.
        progress: called after every step with (label, steps done, number of steps) of the current phase.
        record: called with every outcome.
        line: shows the running step.
    """

    def __init__(
        self,
        session: Session,
        progress: Callable[[str, int, int], None] | None = None,
        record: Callable[[Outcome], object] | None = None,
        line: ProgressLine | None = None,
    ) -> None:
        self.session = session
        self._progress = progress
        self._record = record
        self._line = line
        self._done, self._total = 0, 1

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """Start counting the steps of a phase."""
        self._done, self._total = 0, total

    def run(self, spec: StepSpec) -> Outcome:
        """Run one step unless the store has its artifact."""
        if self._line is not None:
            self._line.started(spec.label, self._done, self._total)
        outcome = execute(spec, self.session.worker, None if self._line is None else self._line.advanced)
        self.finished(spec, outcome)
        return outcome

    def finished(self, spec: StepSpec, outcome: Outcome) -> None:
        """Count and report a finished step."""
        self._done += 1
        if self._record is not None:
            self._record(outcome)
        if self._progress is not None:
            self._progress(spec.label, self._done, self._total)

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """Run steps one after another."""
        return [self.run(spec) for spec in specs]
