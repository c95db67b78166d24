"""Method ``lra``: low-rank-aware adaptive rounding (METHOD 6; MLoRQ, arXiv 2507.09616)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mlorq.rounding.base import (
    METHODS,
    InputSettings,
    IterationSettings,
    Progress,
    RoundingMethod,
    RoundingResult,
    RoundingTask,
)
from mlorq.rounding.closed_form import ClosedFormSettings, round_closed_form
from mlorq.rounding.nearest import round_to_nearest

ELEMENTS = 400.0  # cost of an iteration's element-wise operations per entry of W, in multiply-adds


class LraSettings(InputSettings, IterationSettings):
    """Keys of adaptive rounding."""

    learning_rate: float = Field(0.3, gt=0, description="RAdam step size")
    regularisation: float = Field(0.3, ge=0, description="weight of the rounding regulariser")
    beta_start: float = Field(20.0, gt=0, description="exponent β of the regulariser during warm_up")
    beta_end: float = Field(2.0, gt=0, description="exponent β of the regulariser at the end")
    warm_up: float = Field(0.2, ge=0, le=1, description="fraction of iterations before β decreases")
    stop_loss: float = Field(1e-8, ge=0, description="stop a layer's iterations below this loss")
    start: str = Field("nearest", description="method whose matrices and codes are the starting point")

    def check(self) -> None:
        able = [method.name for method in METHODS if type(method).start is not RoundingMethod.start]
        if self.start not in able:
            raise ValueError(f"start: {self.start!r} is not a possible start; choose {', '.join(able)}")


class Lra(RoundingMethod[LraSettings]):
    """Jointly learned rounding of all matrices of a form."""

    name = "lra"
    title = "adaptive rounding (LRA)"
    settings = layer_settings = LraSettings

    def round(self, task: RoundingTask, settings: LraSettings, progress: Progress | None = None) -> RoundingResult:
        if task.moments is None:
            return round_to_nearest(task)
        if not task.form.separate:
            return round_closed_form(task, ClosedFormSettings(feedback=True))
        from mlorq.rounding.adaptive_rounding import round_adaptively

        parts = METHODS[settings.start].start(task)
        assert parts is not None, settings.start
        return round_adaptively(task, parts, settings, progress)

    def layer_work(self, params: int, width: int, settings: Any) -> float:
        return float(settings.iterations * (params * width + ELEMENTS * params))


METHODS.register(Lra())
