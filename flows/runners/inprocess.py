"""Steps as calls in the flow's process."""

from __future__ import annotations

from flows.runners.base import Watch
from steps.base import Outcome, StepSpec, execute
from steps.context import Worker


class InProcessRunner:
    """Runs steps on one worker.

    Args:
        worker: on the device, with its own copy of the model.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    @property
    def device(self) -> str:
        """The device of the worker."""
        return self.worker.device

    @property
    def place(self) -> str:
        """The device."""
        return self.worker.device

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step in this thread."""
        return execute(spec, self.worker, watch.progress)

    def close(self) -> None:
        """Nothing to release: the flow owns the worker."""
