"""Data sets as sources return them: batches that the model takes, a key, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from mlorq.errors import DataError
from mlorq.models.base import FloatModel
from mlorq.models.family import FAMILIES

Batch = Any
OutputMetric = Callable[[Tensor], dict[str, float]]
ModelMetric = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Predicted:
    """What a model predicts for all samples, and what is right; metrics of other packages read it.

    Attributes:
        kind: ``classes``: class numbers, int64; ``values``: of a regression, float64; ``texts``.
        predictions: ``(samples,)``, or a list of texts.
        references: the same of the labels.
    """

    kind: Literal["classes", "values", "texts"]
    predictions: np.ndarray | list[str]
    references: np.ndarray | list[str]


@runtime_checkable
class Predicts(Protocol):
    """A metric of a ``Dataset`` that is computed from single predictions."""

    def predictions(self, given: Any) -> Predicted:
        """The predictions, from what the metric itself is called with."""


@dataclass(frozen=True)
class LabelCheck:
    """Labels of a data set, compared with the model's outputs before hours of work.

    Attributes:
        values: ``(samples,)`` class numbers, or target values of a regression.
        where: maps the index of a label to the text that locates it in errors (file and row).
        classes: whether the values are class numbers.
    """

    values: np.ndarray
    where: Callable[[int], str]
    classes: bool = True

    def check(self, outputs: int) -> None:
        """Compare the labels with a model's number of outputs.

        Raises:
            DataError: a label is out of range (the first one is named), the labels are target values and the model is a
                classifier, or they are classes and the model is a regressor.
        """
        if not self.classes:
            if outputs != 1:
                raise DataError(
                    f"{self.where(0)}: the labels are values, which need a model with one output; this has {outputs}"
                )
            return
        if outputs == 1:
            raise DataError(
                f"{self.where(0)}: the labels are classes, but the model has one output; use metric pearson or spearman"
            )
        wrong = np.flatnonzero((self.values < 0) | (self.values >= outputs))
        if len(wrong):
            label = int(self.values[wrong[0]])
            raise DataError(
                f"{self.where(int(wrong[0]))}: label {label} is out of range: the model has {outputs} classes"
            )


def classes_of(model: FloatModel) -> int | None:
    """Number of classes of a model according to its library: 1 for a regressor, None if unknown."""
    return FAMILIES[model.family].classes(model)


@dataclass(frozen=True)
class Dataset:
    """Samples ready for the model.

    Attributes:
        batches: inputs of the model, on the CPU, in a fixed order.
        samples: number of samples in all batches.
        key: hash of the samples (contents, labels, preprocessing, batching), independent of paths.
        metric_name: the task's main metric (``accuracy``, ``spearman`` …); None without labels.
        metric: maps f(x) of all samples, ``(samples, outputs)``, to ``{name: value}``; None without labels.
        evaluate: called with the model instead of ``metric``: user code, whose results are reported unchanged, or a
            metric that needs more than f(x), such as a detector's average precision.
        labels: of calibration data, ``(samples,)`` per batch: class numbers (int64) or target values of a regression
            (float); None without labels.
        label_check: compares the labels with the model; None without labels, or if they do not correspond to outputs.
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
        """Refuse labels that the model cannot predict, if its number of classes is known.

        Raises:
            DataError: a label does not fit; the first one's file and row are named.
        """
        if self.label_check is not None and (outputs := classes_of(model)) is not None:
            self.label_check.check(outputs)
