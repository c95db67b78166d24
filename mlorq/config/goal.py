"""The ``goal`` section: the metric that compressed models must keep (``steps.smallest``)."""

from __future__ import annotations

from pydantic import Field

from mlorq.registry import Settings


class GoalConfig(Settings):
    """The metric that compressed models must keep; one of the three bounds. No key of an artifact depends on it."""

    max_drop: str | float | None = Field(
        None, description="how much worse than the float model's it may be: 1% of it, or a difference, 0.01"
    )
    min_metric: float | None = Field(None, description="it must be at least this")
    max_metric: float | None = Field(None, description="it must be at most this")
    metric: str | None = Field(None, description="its name; null: the main metric of the evaluation data")
