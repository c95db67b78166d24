"""What a data source gives the rest of the library: batches that the model takes, a key, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Any
OutputMetric = Callable[[Tensor], dict[str, float]]
ModelMetric = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Dataset:
    """Samples ready for the model.

    Attributes:
        batches: what the model takes, on the CPU, in a fixed order.
        samples: how many samples they hold in all.
        key: hash of the samples (contents, labels, preprocessing, batching); never of paths.
        metric_name: the metric that stands for the task (``accuracy``, ``spearman`` …); None without labels.
        metric: maps f(x) of all samples, ``(samples, outputs)``, to ``{name: value}``; None without labels.
        evaluate: called with the model instead of ``metric``: user code, whose results are reported as they are, or a
            metric that needs more than f(x), such as a detector's average precision.
        labels: of calibration data, ``(samples,)`` a batch: class numbers (int64) or a regressor's values (float);
            None where there are none.
    """

    batches: Sequence[Batch]
    samples: int
    key: str
    metric_name: str | None = None
    metric: OutputMetric | None = None
    evaluate: ModelMetric | None = None
    labels: Sequence[Tensor] | None = None
