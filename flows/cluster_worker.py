"""The body of every task on a cluster, Dask's or Ray's: one step, in a worker's process.

Only a step's description passes through the scheduler; a worker opens the store, loads model and data once, and keeps
them for the next step of the same run.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import closing
from typing import Any

from prefect.logging import get_run_logger
from prefect.states import Completed

from flows.device_limits import DeviceSlot
from flows.runners import Runner, make_runner
from flows.runners.base import LogOnly
from mlorq.artifacts.hashing import digest_json
from mlorq.config.run import RunConfig
from steps.base import StepSpec
from steps.devices import devices
from steps.session import open_store, open_worker

_idle: dict[str, deque[Runner]] = {}  # idle runners of this process, by run
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
    idle = _idle_runners(digest_json([config, folder]))
    try:
        runner = idle.pop()
    except IndexError:
        runner = _new_runner(run)
    log.info("%s: on %s", label, runner.place)
    try:
        with closing(DeviceSlot(runner.device, run.engine.device_slots, log)) as slot, slot.held(lambda: None):
            outcome = runner.run(StepSpec.from_json(spec), LogOnly(log))
    finally:
        idle.append(runner)
    log.info("%s: %.2f s on %s", label, outcome.seconds, runner.place)
    data = {"uri": open_store(run).uri(outcome.ref), "seconds": outcome.seconds, "reused": outcome.reused}
    if outcome.reused:
        return Completed(name="Cached", message=f"reused {data['uri']}", data=data)
    return data


def _idle_runners(run: str) -> deque[Runner]:
    """The idle runners of a run; those of an earlier run are closed."""
    with _lock:
        if run not in _idle:
            for old in [runner for runners in _idle.values() for runner in runners]:
                old.close()
            _idle.clear()
            _idle[run] = deque()
        return _idle[run]


def _new_runner(config: RunConfig) -> Runner:
    device = devices(config)[0]
    return make_runner(config, device, lambda: open_worker(config, device))
