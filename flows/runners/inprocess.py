"""Steps as calls in the flow's own process."""

from __future__ import annotations

from flows.runners.base import Watch
from steps.base import Outcome, StepSpec, execute
from steps.context import Workbench


class InProcessRunner:
    """Runs steps on one workbench.

    Args:
        bench: with the device, and a model of its own.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    @property
    def place(self) -> str:
        """The device."""
        return self.bench.device

    def run(self, spec: StepSpec, watch: Watch) -> Outcome:
        """Run a step here and now."""
        return execute(spec, self.bench, watch.progress)

    def close(self) -> None:
        """Nothing to let go of: the workbench is the flow's."""
