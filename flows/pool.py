"""Fan-outs over several child processes on one device, without Prefect: for programs that run steps directly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType

from flows.runners import ChildRunner
from flows.runners.base import LogOnly
from steps.base import Outcome, StepSpec, find
from steps.inprocess import InProcess
from steps.session import Session


class Pool(InProcess):
    """Like ``InProcess``, but fan-outs are distributed over ``workers`` processes on the session's device.

    One process seldom keeps a GPU busy; the small kernels of several do. A context manager: leaving it ends them.
    """

    def __init__(
        self,
        session: Session,
        workers: int = 1,
        progress: Callable[[str, int, int], None] | None = None,
        record: Callable[[Outcome], object] | None = None,
    ) -> None:
        super().__init__(session, progress, record)
        self.workers = workers

    def __enter__(self) -> Pool:
        self._runners = [ChildRunner(self.session.config, self.session.device) for _ in range(self.workers)]
        self._free: SimpleQueue[ChildRunner] = SimpleQueue()
        for runner in self._runners:
            self._free.put(runner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            runner.close()

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """Run steps in the child processes; in this process if there is one step or one worker."""
        if min(self.workers, len(specs)) < 2:
            return super().map(specs)
        outcomes = []
        with ThreadPoolExecutor(self.workers) as threads:
            for spec, outcome in zip(specs, threads.map(self._carry_out, specs), strict=True):
                self.finished(spec, outcome)
                outcomes.append(outcome)
        return outcomes

    def _carry_out(self, spec: StepSpec) -> Outcome:
        known = find(spec, self.session.store)
        if known is not None:
            return known
        runner = self._free.get()
        try:
            return runner.run(spec, LogOnly(logging.getLogger(__name__)))
        finally:
            self._free.put(runner)
