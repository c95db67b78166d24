"""Carries a run's steps out as Prefect task runs, one task a layer and step.

A step's artifact is looked up in the store before anything else; a hit is shown to Prefect as Cached and takes neither
a device nor a model. What has to be computed runs in this process: single steps in the calling thread on the main
workbench (so that successive rounding steps find their paired models), fan-outs in as many threads as there are
devices, each with a workbench of its own. Tasks take and return small JSON only: a step's description, a key.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.ledger import Ledger
from flows.progress import Observer
from flows.run import check_present
from mlorq.errors import StoreError
from steps.base import Outcome, StepSpec, execute, find
from steps.workbench import Workbench

RETRY_SECONDS = (1, 5)
LOOK_UPS = 16  # at a time, where the store is behind a network
LASTING_FAULTS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG}

T = TypeVar("T")


class Stopped(Exception):
    """Raised inside a step's progress report when the run was interrupted."""


class PrefectExecutor:
    """Implements ``steps.pipeline.Executor`` inside a flow run. A context manager: leaving it stops the workers.

    Args:
        bench: the main workbench, on the first device.
        observer: told what happens.
        devices: one worker each; the first is the main workbench's.
        allocate_only: the command that computes all else, where allocations alone may be computed.
        interrupted: set by Ctrl-C: nothing is started any more, and running steps end at their next report.
    """

    def __init__(
        self,
        bench: Workbench,
        observer: Observer,
        devices: Sequence[str],
        *,
        allocate_only: str | None = None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self.bench = bench
        self._allocate_only = allocate_only
        self.observer = observer
        self.ledger = Ledger()
        self.task_runs = 0
        self._interrupted = interrupted or threading.Event()
        self._stop = threading.Event()  # the run is over: running steps end at their next report
        self._skip = threading.Event()  # a step has failed: running steps end well, waiting ones are left out
        self._errors: dict[str, BaseException] = {}
        self._writable = False
        self._tasks: dict[str, Task[..., Any]] = {}
        self._workers = [bench, *(bench.on_device(device) for device in devices[1:])]
        self._free: queue.SimpleQueue[Workbench] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=len(self._workers))

    def __enter__(self) -> PrefectExecutor:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._runner.__exit__(kind, error, trace)

    # -- steps.pipeline.Executor ------------------------------------------------------------------------------

    def phase(self, name: str, total: int) -> None:
        """Announce that ``total`` steps of a kind come next."""
        self.observer.phase(name, total)

    def run(self, spec: StepSpec) -> Outcome:
        """Run one step on the main workbench, in the calling thread, unless its artifact is there."""
        return self.map([spec], alone=True)[0]

    def map(self, specs: Sequence[StepSpec], alone: bool = False) -> list[Outcome]:
        """Run independent steps whose artifacts are not there.

        Args:
            specs: the steps.
            alone: on the main workbench, in the calling thread, one after another.

        Raises:
            MlorqError: of the first step that failed; steps that ran beside it have ended well.
        """
        self._check_interrupted()
        found = self._find_all(specs)
        for spec, outcome in zip(specs, found, strict=True):
            if outcome is not None:
                self._record_hit(spec, outcome)
        missing = [spec for spec, outcome in zip(specs, found, strict=True) if outcome is None]
        if missing:
            if self._allocate_only is not None:
                check_present(missing[0], self.bench, self._allocate_only)
            self._check_writable()
            # One worker needs no threads: in the main thread an interrupt takes effect at once.
            if alone or len(self._workers) == 1:
                for spec in missing:
                    self._check_interrupted()
                    self._call(spec, spec.to_json())
            else:
                self._fan_out(missing)
        return [self.ledger.outcomes[spec.key] for spec in specs]

    # -- hits -------------------------------------------------------------------------------------------------

    def _find_all(self, specs: Sequence[StepSpec]) -> list[Outcome | None]:
        def look_up(spec: StepSpec) -> Outcome | None:
            return _patiently(lambda: find(spec, self.bench))

        if self.bench.store.is_local or len(specs) < 2:
            return [look_up(spec) for spec in specs]
        with ThreadPoolExecutor(LOOK_UPS) as pool:
            return list(pool.map(look_up, specs))

    def _record_hit(self, spec: StepSpec, outcome: Outcome) -> None:
        self.ledger.add(spec, outcome)
        self._call(spec, None, self.bench.store.uri(spec.ref))
        self.observer.step_finished(spec, outcome)

    # -- computing --------------------------------------------------------------------------------------------

    def _call(self, spec: StepSpec, description: dict[str, Any] | None, hit: str | None = None) -> None:
        """One task run in the calling thread."""
        call: Callable[..., object] = self._task(spec)
        call(spec.label, description, False, hit)
        self.task_runs += 1

    def _fan_out(self, specs: Sequence[StepSpec]) -> None:
        futures: dict[PrefectFuture[Any], StepSpec] = {}
        try:
            for spec in specs:
                parameters = {"label": spec.label, "spec": spec.to_json(), "pooled": True, "hit": None}
                futures[self._runner.submit(self._task(spec), parameters)] = spec
                self.task_runs += 1
            failed: BaseException | None = None
            for future in as_completed(list(futures)):
                future.wait()  # it is done; this takes its state over, which is else asked of the server
                state = future.state
                if failed is None and not state.is_completed() and not state.is_cancelled():
                    failed = self._errors.get(futures[future].key) or RuntimeError(f"{state.name}: {state.message}")
                    self._skip.set()
        except BaseException:
            self._stop.set()
            raise
        self._check_interrupted()
        if failed is not None:
            raise failed

    def _task(self, spec: StepSpec) -> Task[..., Any]:
        """The Prefect task of a kind of step; Prefect's pages group runs by it."""
        if spec.step not in self._tasks:
            make = task(
                name=spec.step,
                task_run_name="{label}",
                cache_policy=NO_CACHE,
                persist_result=False,
                retries=len(RETRY_SECONDS),
                retry_delay_seconds=list(RETRY_SECONDS),
                retry_condition_fn=_is_worth_retrying,
            )
            self._tasks[spec.step] = make(self._carry_out)
        return self._tasks[spec.step]

    def _carry_out(self, label: str, spec: dict[str, Any] | None, pooled: bool, hit: str | None = None) -> Any:
        """Body of every task: the step's artifact, as the store's URI and what making it took."""
        if hit is not None or spec is None:
            return Completed(name="Cached", message=f"reused {hit}", data={"uri": hit})
        step = StepSpec.from_json(spec)
        if self._skip.is_set() or self._stop.is_set() or self._interrupted.is_set():
            return Cancelled(message="not started: the run ended before")
        log = get_run_logger()

        def report(done: int, total: int) -> None:
            if pooled and (self._stop.is_set() or self._interrupted.is_set()):
                raise Stopped
            self._check_interrupted()
            self.observer.step_progress(step, done, total)

        with self._lease(pooled) as bench:
            self.observer.step_started(step)
            log.info("%s: on %s", label, bench.device)
            try:
                outcome = execute(step, bench, report)
            except Stopped:
                self.observer.step_failed(step)
                return Cancelled(message="interrupted")
            except BaseException as error:
                self._errors[step.key] = error
                self.observer.step_failed(step)
                raise
            log.info("%s: %.2f s on %s", label, outcome.seconds, bench.device)
        self.ledger.add(step, outcome)
        self.observer.step_finished(step, outcome)
        uri = bench.store.uri(outcome.ref)
        if outcome.reused:  # another run made it since we looked
            return Completed(name="Cached", message=f"reused {uri}", data={"uri": uri})
        return {"uri": uri, "seconds": round(outcome.seconds, 3)}

    def _check_interrupted(self) -> None:
        """In the main thread: stop where the interrupt itself was lost (``flows.terminal.interruptible``)."""
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _lease(self, pooled: bool) -> Iterator[Workbench]:
        """A workbench for the time of a step."""
        if not pooled:
            yield self.bench
            return
        bench = self._free.get()
        try:
            yield bench
        finally:
            self._free.put(bench)

    def _check_writable(self) -> None:
        """Before the first step that is computed, so that a run that only reuses can read from a read-only store."""
        if not self._writable:
            _patiently(self.bench.store.check_writable)
            self._writable = True


def _can_pass(error: BaseException | None) -> bool:
    """Whether an error is the store's and may be gone at the next try: a network that was down, not a full disk."""
    fault = error.__cause__ if isinstance(error, StoreError) else error
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    return isinstance(fault, OSError) and not isinstance(fault, lasting) and fault.errno not in LASTING_FAULTS


def _is_worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    data = state.data
    return isinstance(data, BaseException) and _can_pass(data)


def _patiently(call: Callable[[], T]) -> T:
    """``call()``, tried again like a task where a fault of the store may pass."""
    for seconds in RETRY_SECONDS:
        try:
            return call()
        except Exception as error:
            if not _can_pass(error):
                raise
            time.sleep(seconds)
    return call()
