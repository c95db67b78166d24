"""Fan-outs on a Dask cluster: one started for the run, or an existing one, on any number of machines.

Only a step's description passes through the scheduler; a worker opens the store, loads model and data once, and keeps
them for the next step of the same run. The sequential steps of rounding stay on one worker, which keeps the partly
rounded model between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import dask
from prefect import Task
from prefect.futures import PrefectFuture

from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, TransientError
from mlorq.extras import install_command
from steps.base import Needs, StepSpec
from steps.protocol import reject_memory_store

# A worker holds the model and the data of a run, which Dask can neither write to a disk nor wait for to go: one that
# pauses for its memory would never go on. One that takes more than its limit is ended and started again.
KEEP_RUNNING = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}


class DaskPool:
    """Submits tasks to a cluster, with their resources. A context manager; entering it starts the cluster.

    Attributes:
        threads: of all workers: the number of steps that run at once.

    Args:
        config: of the run.

    Raises:
        ConfigError: prefect-dask is not installed, or the cluster is not available.
        StoreError: the store is in memory.
    """

    def __init__(self, config: RunConfig) -> None:
        reject_memory_store(config)
        try:
            from prefect_dask import DaskTaskRunner
        except ImportError as error:
            raise ConfigError(
                f"engine.runner: dask needs the extra dask: {install_command('dask')} ({error})"
            ) from None
        settings = config.engine.dask
        self.config = config
        try:
            if settings.address:
                self._runner = DaskTaskRunner(address=settings.address)
            else:
                arguments = {"dashboard_address": None} | settings.arguments
                self._runner = DaskTaskRunner(cluster_class=settings.cluster, cluster_kwargs=arguments)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"engine.dask: no cluster {settings.cluster}: {error}") from None

    def __enter__(self) -> DaskPool:
        self._runner.__enter__()  # type: ignore[no-untyped-call]
        settings = self.config.engine.dask
        try:
            with dask.config.set(KEEP_RUNNING):  # for the workers of a cluster that starts here
                client = self._runner.client
            client.wait_for_workers(1, timeout=60)
            workers = client.scheduler_info(n_workers=-1)["workers"]
        except Exception as error:
            self._runner.__exit__(None, None, None)
            what = settings.address or settings.cluster
            raise ConfigError(f"engine.dask: {what} has no worker: {type(error).__name__}: {error}") from error
        self._home = str(sorted(workers)[0])
        self.threads = sum(int(worker["nthreads"]) for worker in workers.values())
        self._offered = offered_by([worker.get("resources") or {} for worker in workers.values()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)

    def submit(
        self, task: Task[..., Any], spec: StepSpec, parameters: dict[str, Any], *, priority: int, home: bool
    ) -> PrefectFuture[Any]:
        """Submit one task.

        Args:
            task: the task.
            spec: of its step.
            parameters: of the task.
            priority: tasks with higher priority start first.
            home: whether to prefer the worker that keeps the state of sequential steps.
        """
        annotations: dict[str, Any] = {"priority": priority}
        resources = resources_of(spec.needs, self._offered)
        if resources:
            annotations["resources"] = resources
        if home and (worker := self._home_worker()) is not None:
            annotations |= {"workers": [worker], "allow_other_workers": True}
        with dask.annotate(**annotations):
            return self._runner.submit(task, parameters)

    def _home_worker(self) -> str | None:
        """The worker that keeps the state of sequential steps, or another one once it is lost; None if it is alone.

        A task that prefers the address of a worker waits forever if that was the only one and starts again at another.
        """
        workers = sorted(self._runner.client.scheduler_info(n_workers=-1)["workers"])
        if len(workers) < 2:
            return None
        if self._home not in workers:
            self._home = str(workers[0])
        return self._home

    def explained(self, error: BaseException) -> BaseException:
        """The error of a task as users see it: a sentence if its workers were lost again and again."""
        from distributed.scheduler import KilledWorker

        if not isinstance(error, KilledWorker):
            return error
        return TransientError(
            f"its worker was lost {error.allowed_failures + 1} times; out of memory? Give workers more "
            "(memory_limit in engine.dask.arguments, or fewer workers), or let a step take less (engine.memory, "
            "engine.weights)"
        )

    def cancel(self, futures: list[PrefectFuture[Any]]) -> None:
        """Cancel the tasks that have not started."""
        with suppress(Exception):  # a scheduler that has ended has nothing to cancel
            self._runner.client.cancel([future.wrapped_future for future in futures])  # type: ignore[attr-defined, no-untyped-call]


def offered_by(workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The resources that all workers offer, with the most that one of them offers."""
    names = set.intersection(*map(set, workers)) if workers else set()
    return {name: max(worker[name] for worker in workers) for name in names}


def resources_of(needs: Needs, offered: Mapping[str, float]) -> dict[str, float]:
    """Dask resources that a step requests: ``GPU`` (one) and ``MEMORY`` (bytes), if all workers offer them.

    Args:
        needs: of the step.
        offered: by workers; a request that none of them can meet would wait forever.
    """
    wanted = {"GPU": 1.0 if needs.device else 0.0, "MEMORY": float(needs.memory_bytes)}
    return {name: min(amount, offered[name]) for name, amount in wanted.items() if name in offered and amount > 0}
