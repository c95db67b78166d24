"""The body of every task on a cluster, Dask's or Ray's: one step, in a worker's process.

Only a step's description passes through the scheduler; a worker opens the store, loads model and data once, and keeps
them for the next step of the same run.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from prefect.logging import get_run_logger
from prefect.states import Completed

from flows.device_limits import DeviceSlot
from flows.runners import Runner, make_runner
from flows.runners.base import LogOnly
from mlorq.artifacts.hashing import digest_json
from mlorq.config.run import RunConfig
from mlorq.memory import at_most
from steps.base import StepSpec
from steps.context import Worker
from steps.devices import devices
from steps.session import Session, open_store


@dataclass
class _Run:
    """What this process keeps of a run: a model for each of its threads, and the data once.

    Attributes:
        session: has the data.
        idle: runners that no thread uses.
    """

    session: Session
    idle: deque[Runner] = field(default_factory=deque)
    _begun: bool = False

    def worker(self) -> Worker:
        """A worker that nobody else has: the session's, or another one with a model of its own."""
        with _lock:
            first, self._begun = not self._begun, True
        return self.session.worker if first else self.session.worker_on(self.session.device)


_runs: dict[str, _Run] = {}  # the present one, by its configuration
_lock = threading.Lock()


def run_on_worker(label: str, spec: dict[str, Any], config: dict[str, Any], folder: str) -> Any:
    """Run a step in this process.

    Args:
        label: of the step, for the log.
        spec: of the step, as JSON values.
        config: of the run, as JSON values.
        folder: base of its relative paths.

    Returns:
        The data for the flow's ledger, as JSON values or as the data of a state.

    Raises:
        MlorqError: of the step.
    """
    run = RunConfig.from_mapping(config, folder)
    log = get_run_logger()
    kept = _kept(digest_json([config, folder]), run)
    try:
        runner = kept.idle.pop()
    except IndexError:
        runner = make_runner(run, kept.session.device, kept.worker)
    log.info("%s: on %s", label, runner.place)
    try:
        with (
            closing(DeviceSlot(runner.device, run.engine.device_slots, log)) as slot,
            slot.held(lambda: None),
            at_most(_free()),
        ):
            outcome = runner.run(StepSpec.from_json(spec), LogOnly(log))
    finally:
        kept.idle.append(runner)
    log.info("%s: %.2f s on %s", label, outcome.seconds, runner.place)
    data = {"uri": open_store(run).uri(outcome.ref), "seconds": outcome.seconds, "reused": outcome.reused}
    if outcome.reused:
        return Completed(name="Cached", message=f"reused {data['uri']}", data=data)
    return data


def _kept(run: str, config: RunConfig) -> _Run:
    """What is kept of a run; the runners of an earlier one are closed."""
    with _lock:
        if run not in _runs:
            for old in [runner for kept in _runs.values() for runner in kept.idle]:
                old.close()
            _runs.clear()
            _runs[run] = _Run(Session(config, open_store(config), devices(config)[0]))
        return _runs[run]


def _free() -> int | None:
    """Bytes that this process may take before Dask ends it; None if it is no worker of Dask, or has no limit."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # of another kind
        return None
    limit = worker.memory_manager.memory_limit
    return None if limit is None else max(0, int(limit) - int(worker.monitor.get_process_memory()))
