"""Method ``gptq``: GPTQ with input moments of the partly compressed model (arXiv 2210.17323; METHOD 7)."""

from __future__ import annotations

from mlorq.registry import Settings
from mlorq.rounding.base import METHODS, InputSettings, Progress, RoundingMethod, RoundingResult, RoundingTask
from mlorq.rounding.nearest import round_to_nearest

WORK = 60.0  # cost of scales, GPTQ and coordinate descent of a layer, in products of m·n·n multiply-adds


class Gptq(RoundingMethod[InputSettings]):
    """GPTQ, followed by least-squares scales and coordinate descent on the codes."""

    name = "gptq"
    title = "GPTQ (2210.17323)"
    settings = layer_settings = InputSettings
    compared = True

    def round(self, task: RoundingTask, settings: InputSettings, progress: Progress | None = None) -> RoundingResult:
        if task.moments is None:
            return round_to_nearest(task)
        from mlorq.rounding.error_feedback import round_without_feedback

        return round_without_feedback(task)

    def layer_work(self, params: int, width: int, settings: Settings) -> float:
        return WORK * params * width


METHODS.register(Gptq())
