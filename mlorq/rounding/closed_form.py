"""Method ``closed_form``: GPTQ of a weight that compensates for the errors of earlier layers (METHOD 7)."""

from __future__ import annotations

from pydantic import Field

from mlorq.registry import Settings
from mlorq.rounding.base import METHODS, InputSettings, Parts, Progress, RoundingMethod, RoundingResult, RoundingTask
from mlorq.rounding.gptq import WORK
from mlorq.rounding.nearest import round_to_nearest


class ClosedFormSettings(InputSettings):
    """Keys of closed forms."""

    feedback: bool = Field(
        True, description="error feedback: correct weights and biases for the errors of earlier layers"
    )


def round_closed_form(task: RoundingTask, settings: ClosedFormSettings) -> RoundingResult:
    """Round one layer in closed form, with error feedback if ``settings.feedback``."""
    if task.moments is None:
        return round_to_nearest(task)
    from mlorq.rounding.error_feedback import round_with_feedback, round_without_feedback

    return round_with_feedback(task) if settings.feedback else round_without_feedback(task)


class ClosedForm(RoundingMethod[ClosedFormSettings]):
    """GPTQ with error feedback."""

    name = "closed_form"
    title = "GPTQ with error feedback"
    settings = layer_settings = ClosedFormSettings

    def round(
        self, task: RoundingTask, settings: ClosedFormSettings, progress: Progress | None = None
    ) -> RoundingResult:
        return round_closed_form(task, settings)

    def start(self, task: RoundingTask) -> Parts | None:
        """Float matrices whose nearest rounding equals the closed form without feedback."""
        if task.moments is None:
            return None
        from mlorq.codecs.affine import Rounded
        from mlorq.rounding.error_feedback import best_parts

        parts = best_parts(task, task.fit.weight, task.moments).parts if task.form.separate else {}
        return {name: (part.latent(), part.quantizer) for name, part in parts.items() if isinstance(part, Rounded)}

    def layer_work(self, params: int, width: int, settings: Settings) -> float:
        return WORK * params * width


METHODS.register(ClosedForm())
