"""Runners: where steps run. ``engine.steps`` of the configuration names one of them.

All runners look a step's key up in the same store and write the same bytes; the flow, its tasks and its caching do not
depend on the runner. ``flows.executor`` distributes steps over runners.
"""

from __future__ import annotations

from collections.abc import Callable

from flows.runners.base import Runner, Watch
from flows.runners.child import ChildRunner
from flows.runners.inprocess import InProcessRunner
from mlorq.config.run import RunConfig
from steps.context import Worker

__all__ = ["ChildRunner", "InProcessRunner", "Runner", "Watch", "make_runner"]


def make_runner(config: RunConfig, device: str, worker: Callable[[], Worker]) -> Runner:
    """The runner that ``engine.steps`` names, for one device.

    Args:
        config: of the run.
        device: ``cpu``, ``cuda:0`` …
        worker: returns a worker on that device, for runners in this process.

    Raises:
        ConfigError: a requirement of the runner is missing.
        StoreError: the runner's processes cannot access the store.
    """
    if config.engine.steps == "subprocess":
        return ChildRunner(config, device)
    if config.engine.steps == "docker":
        from flows.runners.container import ContainerRunner  # imports docker

        return ContainerRunner(config, device)
    return InProcessRunner(worker())
