"""What a data source gives the rest of the library: batches that the model takes, a key, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from mlorq.errors import DataError
from mlorq.models.base import FloatModel
from mlorq.models.family import FAMILIES

Batch = Any
OutputMetric = Callable[[Tensor], dict[str, float]]
ModelMetric = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class LabelCheck:
    """The labels of a data set as its files have them, to be compared with the model before hours of work.

    Attributes:
        values: ``(samples,)`` class numbers, or a regressor's values.
        where: names the file and row of a label.
        classes: whether they are class numbers.
    """

    values: np.ndarray
    where: Callable[[int], str]
    classes: bool = True

    def check(self, outputs: int) -> None:
        """Compare the labels with a model's number of outputs.

        Raises:
            DataError: names the first label that is out of range; or values meet a classifier, or classes a regressor.
        """
        if not self.classes:
            if outputs != 1:
                raise DataError(f"{self.where(0)}: values as labels need a model with one output, this has {outputs}")
            return
        if outputs == 1:
            raise DataError(f"{self.where(0)}: a model with one output has no classes; use metric pearson or spearman")
        wrong = np.flatnonzero((self.values < 0) | (self.values >= outputs))
        if len(wrong):
            label = int(self.values[wrong[0]])
            raise DataError(
                f"{self.where(int(wrong[0]))}: label {label} is out of range: the model has {outputs} classes"
            )


def classes_of(model: FloatModel) -> int | None:
    """How many classes a model tells apart (one: a regressor), as its library has it; None where that is not known."""
    return FAMILIES[model.family].classes(model)


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
        labels: of calibration data, ``(samples,)`` per batch: class numbers (int64) or a regressor's values (float);
            None where there are none.
        label_check: compares the labels with the model; None where there are none, or they stand for no output.
    """

    batches: Sequence[Batch]
    samples: int
    key: str
    metric_name: str | None = None
    metric: OutputMetric | None = None
    evaluate: ModelMetric | None = None
    labels: Sequence[Tensor] | None = None
    label_check: LabelCheck | None = None

    def check_labels(self, model: FloatModel) -> None:
        """Refuse labels that the model cannot give, as far as its number of classes is known.

        Raises:
            DataError: names the file and row of the first one.
        """
        if self.label_check is not None and (outputs := classes_of(model)) is not None:
            self.label_check.check(outputs)
