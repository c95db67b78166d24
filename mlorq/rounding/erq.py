"""Method ``erq``: two ridge regressions around the rounding of a layer (ERQ, arXiv 2407.06794; METHOD 9)."""

from __future__ import annotations

from mlorq.registry import Settings
from mlorq.rounding.base import METHODS, InputSettings, Parts, Progress, RoundingMethod, RoundingResult, RoundingTask
from mlorq.rounding.gptq import WORK
from mlorq.rounding.nearest import round_to_nearest


class Erq(RoundingMethod[InputSettings]):
    """ERQ; factors are rounded to nearest after the first regression."""

    name = "erq"
    title = "ERQ (2407.06794)"
    settings = layer_settings = InputSettings
    compared = True

    def round(self, task: RoundingTask, settings: InputSettings, progress: Progress | None = None) -> RoundingResult:
        if task.moments is None:
            return round_to_nearest(task)
        from mlorq.rounding.ridge_rounding import round_by_ridges

        return round_by_ridges(task)

    def start(self, task: RoundingTask) -> Parts | None:
        """Float matrices and quantizers of the weight after the first regression."""
        if task.moments is None:
            return None
        from mlorq.rounding.ridge_rounding import corrected_fit

        return task.parts(corrected_fit(task.fit, task.moments))

    def layer_work(self, params: int, width: int, settings: Settings) -> float:
        return WORK * params * width


METHODS.register(Erq())
