"""Method ``erq``: two ridge regressions around the rounding of a layer (ERQ, arXiv 2407.06794; METHOD 8)."""

from __future__ import annotations

from mlorq.registry import Settings
from mlorq.rounding.base import METHODS, InputSettings, Parts, Progress, RoundingMethod, RoundingResult, RoundingTask
from mlorq.rounding.gptq import WORK
from mlorq.rounding.nearest import round_to_nearest


class Erq(RoundingMethod[InputSettings]):
    """ERQ; forms with factors get the first regression, and then nearest rounding of their factors."""

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
        """Matrices of the weight moved by the first regression."""
        if task.moments is None:
            return None
        from mlorq.rounding.ridge_rounding import moved_fit

        moved = task.rounded(moved_fit(task.fit, task.moments))
        return {name: (part.values, part.quantizer) for name, part in moved.items()}

    def layer_work(self, params: int, in_features: int, settings: Settings) -> float:
        return WORK * params * in_features


METHODS.register(Erq())
