"""Runs the steps of a run as Prefect task runs, one task per layer and step.

A step's artifact is first looked up in the store; a hit is recorded in Prefect as Cached and needs neither a device nor
a model. Missing steps go to a runner (``flows.runners``): single steps in the calling thread to the first runner (so
that successive rounding steps find their paired models), fan-outs to all runners, one per device, in as many threads;
or to a cluster (``flows.dask_pool``, ``flows.ray_pool``). Tasks take and return small JSON values only: a step's
description, a key.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.allocate_only import check_present
from flows.device_limits import DeviceSlot
from flows.failures import add_step
from flows.ledger import Ledger
from flows.progress import Observer
from flows.runners import Runner, make_runner
from flows.runners.base import POLL_SECONDS
from steps.base import Outcome, StepSpec, find
from steps.faults import RETRY_SECONDS, is_transient, with_retries
from steps.session import Session

if TYPE_CHECKING:
    from flows.dask_pool import DaskPool
    from flows.ray_pool import RayPool

    Cluster = DaskPool | RayPool

LOGGER = logging.getLogger(__name__)
LOOK_UPS = 16  # concurrent look-ups in a remote store


class Stopped(Exception):
    """Raised in a step's progress callback if the run was interrupted."""


class PrefectExecutor:
    """Implements ``steps.pipeline.Executor`` inside a flow run. A context manager: leaving it stops the workers.

    Args:
        session: of the run.
        observer: receives the progress.
        devices: one runner each; the first is the session's device.
        allocate_only: if only allocations may be computed, the command that computes the other steps.
        interrupted: set by Ctrl-C: no further step starts, and running steps end at their next progress report.

    Raises:
        ConfigError: a requirement of the configured runner is missing.
        StoreError: the processes that run steps cannot access the store.
    """

    def __init__(
        self,
        session: Session,
        observer: Observer,
        devices: Sequence[str],
        *,
        allocate_only: str | None = None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self.session = session
        self._allocate_only = allocate_only
        self.observer = observer
        self.ledger = Ledger()
        self.task_runs = 0
        self._interrupted = interrupted or threading.Event()
        self._stop = threading.Event()  # the run is over: running steps end at their next progress report
        self._skip = threading.Event()  # a step has failed: running steps finish, waiting ones are skipped
        self._errors: dict[str, BaseException] = {}
        self._writable = False
        self._tasks: dict[str, Task[..., Any]] = {}
        self._runners = _make_runners(session, devices)
        limit = session.config.engine.device_slots
        self._slots = {runner.device: DeviceSlot(runner.device, limit, LOGGER) for runner in self._runners}
        self._free: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        for runner in self._runners:
            self._free.put(runner)
        self._threads: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=len(self._runners))
        self._cluster = _make_cluster(session)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> PrefectExecutor:
        self._exit.enter_context(self._threads)
        if self._cluster is not None:
            self._exit.enter_context(self._cluster)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            self._exit.__exit__(kind, error, trace)
        finally:
            for slot in self._slots.values():
                slot.close()
            for runner in self._runners:
                runner.close()

    # -- steps.pipeline.Executor ------------------------------------------------------------------------------

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """Announce the next phase: ``total`` steps of one kind, of one budget unless ``budget`` is empty."""
        self.observer.phase(name, total, budget)

    def run(self, spec: StepSpec) -> Outcome:
        """Run one step on the session's worker, in the calling thread, unless the store has its artifact."""
        return self.map([spec], alone=True)[0]

    def map(self, specs: Sequence[StepSpec], alone: bool = False) -> list[Outcome]:
        """Run independent steps, except those whose artifacts the store has.

        Args:
            specs: the steps.
            alone: run on the session's worker, in the calling thread, one after another.

        Raises:
            MlorqError: of the first failed step; steps that were running have been completed.
        """
        self._check_interrupted()
        found = self._find_all(specs)
        for spec, outcome in zip(specs, found, strict=True):
            if outcome is not None:
                self._record_hit(spec, outcome)
        missing = [spec for spec, outcome in zip(specs, found, strict=True) if outcome is None]
        if missing:
            if self._allocate_only is not None:
                check_present(missing[0], self.session, self._allocate_only)
            self._check_writable()
            if self._cluster is not None and missing[0].needs.device:
                self._fan_out(missing, self._cluster, home=alone)
            # With one runner, steps run in the main thread: an interrupt takes effect at once.
            elif alone or len(self._runners) == 1:
                for spec in missing:
                    self._check_interrupted()
                    self._call(spec, spec.to_json())
            else:
                self._fan_out(missing)
        return [self.ledger.outcomes[spec.key] for spec in specs]

    # -- hits -------------------------------------------------------------------------------------------------

    def _find_all(self, specs: Sequence[StepSpec]) -> list[Outcome | None]:
        def look_up(spec: StepSpec) -> Outcome | None:
            return with_retries(lambda: find(spec, self.session.store))

        if self.session.store.is_local or len(specs) < 2:
            return [look_up(spec) for spec in specs]
        with ThreadPoolExecutor(LOOK_UPS) as pool:
            return list(pool.map(look_up, specs))

    def _record_hit(self, spec: StepSpec, outcome: Outcome) -> None:
        self.ledger.add(spec, outcome)
        self._call(spec, None, self.session.store.uri(spec.ref))
        self.observer.step_finished(spec, outcome)

    # -- computing --------------------------------------------------------------------------------------------

    def _call(self, spec: StepSpec, description: dict[str, Any] | None, hit: str | None = None) -> None:
        """One task run in the calling thread."""
        call: Callable[..., object] = self._task(spec)
        call(spec.label, description, False, hit)
        self.task_runs += 1

    def _fan_out(self, specs: Sequence[StepSpec], cluster: Cluster | None = None, home: bool = False) -> None:
        """Task runs in threads or on a cluster, started in the order of ``specs``."""
        futures: dict[PrefectFuture[Any], StepSpec] = {}
        finished: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
        try:
            for index, spec in enumerate(specs):
                if cluster is None:
                    parameters = {"label": spec.label, "spec": spec.to_json(), "pooled": True, "hit": None}
                    future: PrefectFuture[Any] = self._threads.submit(self._task(spec), parameters)
                else:
                    future = self._submit_to(cluster, spec, len(specs) - index, home)
                futures[future] = spec
                self.task_runs += 1
                future.add_done_callback(finished.put)
            failed: BaseException | None = None
            # A cluster does not say which steps it has begun: in their order, as many as its workers run at once.
            waiting = iter(() if cluster is None else specs)
            for spec in itertools.islice(waiting, 0 if cluster is None else cluster.threads):
                self.observer.step_started(spec)
            for _ in specs:
                future = self._next(finished)
                error = self._settle(future, futures[future])
                following = next((spec for spec in waiting if spec.key not in self.ledger.outcomes), None)
                if following is not None:
                    self.observer.step_started(following)
                if failed is None and error is not None:
                    failed = error
                    self._skip.set()
                    if cluster is not None:
                        cluster.cancel(list(futures))
                        break
        except BaseException:
            self._stop.set()
            if cluster is not None:
                cluster.cancel(list(futures))
            raise
        self._check_interrupted()
        if failed is not None:
            raise failed

    def _submit_to(self, cluster: Cluster, spec: StepSpec, priority: int, home: bool) -> PrefectFuture[Any]:
        from flows.cluster_worker import run_on_worker

        config = self.session.config
        parameters = {
            "label": spec.label,
            "spec": spec.to_json(),
            "config": config.model_dump(mode="json"),
            "folder": config.folder,
        }
        task_of_kind = _make_task(spec.step, run_on_worker)
        return cluster.submit(task_of_kind, spec, parameters, priority=priority, home=home)

    def _next(self, finished: queue.SimpleQueue[PrefectFuture[Any]]) -> PrefectFuture[Any]:
        """The next finished task; checks for an interrupt while waiting."""
        while True:
            try:
                return finished.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._check_interrupted()

    def _settle(self, future: PrefectFuture[Any], spec: StepSpec) -> BaseException | None:
        """Record the outcome of a finished task; returns its error if it failed."""
        future.wait()  # returns at once and stores the state, which would otherwise be queried from the server
        state = future.state
        if state.is_completed():
            if spec.key not in self.ledger.outcomes:  # it ran in another process
                value = future.result(raise_on_failure=False)
                outcome = Outcome(spec.ref, value["reused"], value["seconds"])
                self.ledger.add(spec, outcome)
                self.observer.step_finished(spec, outcome)
            return None
        if state.is_cancelled():
            return None
        error = self._errors.get(spec.key)
        if error is None:
            error = self._error_elsewhere(future)
            self.observer.step_failed(spec)
        if isinstance(error, BaseException):
            add_step(error, spec.label)
        return error if isinstance(error, BaseException) else RuntimeError(f"{state.name}: {state.message}")

    def _error_elsewhere(self, future: PrefectFuture[Any]) -> BaseException | Any:
        """The error of a task that ran in another process, or of that process."""
        try:
            return future.result(raise_on_failure=False)
        except Exception as error:  # no task has returned
            if self._cluster is None:
                raise
            return self._cluster.explained(error)

    def _task(self, spec: StepSpec) -> Task[..., Any]:
        """The Prefect task of a step's name; Prefect's pages group task runs by it."""
        if spec.step not in self._tasks:
            self._tasks[spec.step] = _make_task(spec.step, self._carry_out)
        return self._tasks[spec.step]

    def _carry_out(self, label: str, spec: dict[str, Any] | None, pooled: bool, hit: str | None = None) -> Any:
        """Body of every task: runs the step; returns the artifact's URI and the seconds that it took."""
        if hit is not None or spec is None:
            return Completed(name="Cached", message=f"reused {hit}", data={"uri": hit})
        step = StepSpec.from_json(spec)
        if self._skip.is_set() or self._stop.is_set() or self._interrupted.is_set():
            return Cancelled(message="not started: the run has ended")
        log = get_run_logger()

        watch = _TaskWatch(self, step, pooled, log)
        with self._lease(pooled) as runner:
            try:
                with self._slots[runner.device].held(watch.check):
                    self.observer.step_started(step)
                    log.info("%s: on %s", label, runner.place)
                    outcome = runner.run(step, watch)
            except Stopped:
                self.observer.step_failed(step)
                return Cancelled(message="interrupted")
            except BaseException as error:
                self._errors[step.key] = error
                add_step(error, label)
                self.observer.step_failed(step)
                raise
            log.info("%s: %.2f s on %s", label, outcome.seconds, runner.place)
        self.ledger.add(step, outcome)
        self.observer.step_finished(step, outcome)
        uri = self.session.store.uri(outcome.ref)
        if outcome.reused:  # another run has written it since the look-up
            return Completed(name="Cached", message=f"reused {uri}", data={"uri": uri})
        return {"uri": uri, "seconds": outcome.seconds}

    def _check_interrupted(self) -> None:
        """Stop the main thread if the KeyboardInterrupt itself was lost (``flows.terminal.interruptible``)."""
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _lease(self, pooled: bool) -> Iterator[Runner]:
        """A runner for the duration of a step."""
        if not pooled:
            yield self._runners[0]
            return
        runner = self._free.get()
        try:
            yield runner
        finally:
            self._free.put(runner)

    def _check_writable(self) -> None:
        """Check once, before the first computed step: a run that only reuses artifacts works with a read-only store."""
        if not self._writable:
            with_retries(self.session.store.check_writable)
            self._writable = True


class _TaskWatch:
    """Implements ``flows.runners.Watch`` for one step; raises in the runner if the run is over."""

    def __init__(self, executor: PrefectExecutor, step: StepSpec, pooled: bool, log: Any) -> None:
        self._executor = executor
        self._step = step
        self._pooled = pooled
        self._log = log

    def progress(self, done: int, total: int) -> None:
        self.check()
        self._executor.observer.step_progress(self._step, done, total)

    def check(self) -> None:
        executor = self._executor
        if self._pooled and (executor._stop.is_set() or executor._interrupted.is_set()):
            raise Stopped
        executor._check_interrupted()

    def log(self, line: str) -> None:
        self._log.debug("%s: %s", self._step.label, line)


def _make_runners(session: Session, devices: Sequence[str]) -> list[Runner]:
    """One runner per device; in this process each has its own copy of the model, the first one the session's."""
    config = session.config
    runners = [make_runner(config, devices[0], lambda: session.worker)]
    if config.engine.runner == "threads":
        runners += [make_runner(config, device, partial(session.worker_on, device)) for device in devices[1:]]
    return runners


def _make_cluster(session: Session) -> Cluster | None:
    if session.config.engine.runner == "dask":
        from flows.dask_pool import DaskPool  # imports distributed

        return DaskPool(session.config)
    if session.config.engine.runner == "ray":
        from flows.ray_pool import RayPool  # imports ray

        return RayPool(session.config)
    return None


def _make_task(step: str, body: Callable[..., Any]) -> Task[..., Any]:
    make = task(
        name=step,
        task_run_name="{label}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(RETRY_SECONDS),
        retry_delay_seconds=list(RETRY_SECONDS),
        retry_condition_fn=_is_worth_retrying,
    )
    return make(body)


def _is_worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    data = state.data
    return isinstance(data, BaseException) and is_transient(data)
