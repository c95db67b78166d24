"""Steps as calls in the flow's own process."""

from __future__ import annotations

from flows.runners.base import Watch
from steps.base import Outcome, StepSpec, execute
from steps.context import Worker


class InProcessRunner:
    """Runs steps on one worker.

    Args:
        worker: with the device, and a model of its own.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    @property
    def place(self) -> str:
        """The device."""
        return self.worker.device

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step here and now."""
        return execute(spec, self.worker, watch.progress)

    def close(self) -> None:
        """Nothing to let go of: the worker is the flow's."""
