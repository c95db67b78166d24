"""Where the work of steps runs, by configuration: ``engine.steps`` names one of the runners here.

All of them look a step's key up in the same store and write the same bytes; the flow, its tasks and its caching are the
same with each. ``fan_out.py`` says how many work at a time.
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
        config: the run's.
        device: ``cpu``, ``cuda:0`` …
        worker: gives a worker on that device, for runners that work in this process.

    Raises:
        ConfigError: what the runner needs is not there.
        StoreError: the store cannot be reached from where the runner works.
    """
    if config.engine.steps == "subprocess":
        return ChildRunner(config, device)
    if config.engine.steps == "docker":
        from flows.runners.container import ContainerRunner  # imports docker

        return ContainerRunner(config, device)
    return InProcessRunner(worker())
