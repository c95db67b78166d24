"""Fan-outs on a Ray cluster: one started for the run on this machine, or an existing one.

As on a Dask cluster (``flows.dask_pool``), workers keep model and data from step to step. On GPUs Ray starts a process
for each task, which loads them anew: Dask is the better choice there.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture

from flows.verbosity import verbosity
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError
from mlorq.extras import install_command
from steps.base import StepSpec
from steps.protocol import reject_memory_store


class RayPool:
    """Submits tasks to a cluster, with their resources. A context manager; entering it starts the cluster.

    Attributes:
        threads: number of steps that run at once.

    Args:
        config: of the run.

    Raises:
        ConfigError: prefect-ray is not installed, or the cluster is not available.
        StoreError: the store is in memory.
    """

    def __init__(self, config: RunConfig) -> None:
        reject_memory_store(config)
        try:
            from prefect_ray import RayTaskRunner
        except ImportError as error:
            raise ConfigError(f"engine.runner: ray needs the extra ray: {install_command('ray')} ({error})") from None
        settings = config.engine.ray
        self._address, self._cpus = settings.address, settings.cpus
        arguments = {"log_to_driver": verbosity().prefect_log, "logging_level": "warning"}
        arguments |= {} if settings.address else {"include_dashboard": False}
        self._runner = RayTaskRunner(address=settings.address, init_kwargs=arguments | settings.arguments)

    def __enter__(self) -> RayPool:
        ray: Any = import_module("ray")  # partly typed, and not installed everywhere
        try:
            self._runner.__enter__()
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
            self._offered = ray.cluster_resources()
        except Exception as error:
            with suppress(Exception):
                self._runner.__exit__(None, None, None)
            what = self._address or "a cluster of this machine"
            raise ConfigError(f"engine.ray: {what} cannot be used: {type(error).__name__}: {error}") from error
        self.threads = int(self._offered.get("CPU", 0) // self._cpus)
        if not self.threads:
            self._runner.__exit__(None, None, None)
            raise ConfigError(
                f"engine.ray.cpus: {self._cpus} are more than the cluster has ({self._offered.get('CPU', 0):g})"
            )
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
            priority: not used: Ray starts tasks in the order in which they come.
            home: whether to prefer the machine that keeps the state of sequential steps.
        """
        from prefect_ray.context import remote_options
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"num_cpus": self._cpus}
        if spec.needs.device and self._offered.get("GPU"):
            options["num_gpus"] = 1
        # A request that no machine can meet would wait for ever.
        most = max(node["Resources"].get("memory", 0.0) for node in self._nodes)
        options["memory"] = int(min(spec.needs.memory_bytes, most))
        if home:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self._nodes[0]["NodeID"], soft=True)
        with remote_options(**options):
            future: PrefectFuture[Any] = self._runner.submit(task, parameters)
        return future

    def explained(self, error: BaseException) -> BaseException:
        """The error of a task as users see it."""
        return error

    def cancel(self, futures: list[PrefectFuture[Any]]) -> None:
        """Cancel the tasks that have not started."""
        ray: Any = import_module("ray")
        for future in futures:
            with suppress(Exception):  # a cluster that has ended has nothing to cancel
                ray.cancel(future.wrapped_future)  # type: ignore[attr-defined]
