"""Method ``nearest``: rounding to the nearest code."""

from __future__ import annotations

from mlorq.registry import Settings
from mlorq.rounding.base import METHODS, Parts, Progress, RoundingMethod, RoundingResult, RoundingTask


class Nearest(RoundingMethod[Settings]):
    """Nearest rounding with scales found by search."""

    name = "nearest"
    title = "nearest rounding"
    settings = layer_settings = Settings
    needs_inputs = False
    compared = True
    compared_activations = {"method": "uniform"}  # noqa: RUF012

    def round(self, task: RoundingTask, settings: Settings, progress: Progress | None = None) -> RoundingResult:
        return round_to_nearest(task)

    def start(self, task: RoundingTask) -> Parts:
        return task.parts()


def round_to_nearest(task: RoundingTask) -> RoundingResult:
    """Round one layer to nearest; moments are used only to report the error."""
    from mlorq.forms.stored_layer import CompressedLayer
    from mlorq.rounding.output_error import output_error

    layer = CompressedLayer.of_rounded(task.layer, task.candidate, task.rounded())
    weight = task.fit.weight
    error = None if task.moments is None else output_error(weight, layer.dense().to(weight.device), task.moments)
    return RoundingResult(layer, error, error)


METHODS.register(Nearest())
