"""Costs of a changed model output: NMSE, KL divergence of the predictions, or rise of the task's loss (METHOD 5).

NMSE needs outputs alone. The divergence ``KL(softmax f(x) ‖ softmax f̂(x))`` weights outputs as a classifier uses them.
The task's loss, cross-entropy or squared error, needs labelled calibration data; its cost is the rise over the float
model's loss, 0 if the loss falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mlorq.errors import DataError, ModelError

CostName = Literal["nmse", "kl", "task"]


class OutputCost:
    """The cost of changed outputs on fixed samples; 0 for unchanged outputs.

    Attributes:
        power: Σ ‖f(x)‖², by which the squared error is divided for ``nmse``.

    Args:
        name: which cost.
        references: f(x) of the float model, ``(samples, outputs)`` per batch.
        labels: ``(samples,)`` per batch, class numbers (integers) or regression targets; only for ``task``.

    Raises:
        ModelError: the model has fewer than two outputs (``kl``).
        DataError: labels are missing, or a label is out of range (``task``).
    """

    def __init__(self, name: CostName, references: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> None:
        self.name = name
        self.references = references
        self.labels: Sequence[Tensor | None] = [None] * len(references)
        self.samples = sum(len(reference) for reference in references)
        if name == "kl" and references[0].shape[1] < 2:
            raise ModelError("search.cost: kl needs a model with outputs of two classes or more; use nmse")
        if name == "task":
            self.labels = self._checked(labels)
        self._float_loss = self._loss(references) if name == "task" else 0.0
        self.power = sum(float(reference.double().square().sum()) for reference in references)

    def _checked(self, labels: Sequence[Tensor] | None) -> list[Tensor]:
        if labels is None:
            raise DataError("search.cost: task needs calibration data with labels; use nmse or kl")
        if [len(part) for part in labels] != [len(reference) for reference in self.references]:
            raise DataError("search.cost: task needs one label per sample of the calibration data")
        classes = self.references[0].shape[1]
        for part in labels:
            bad = [] if part.is_floating_point() else part[(part < 0) | (part >= classes)].tolist()
            if bad:
                raise DataError(f"calibration label {bad[0]} is out of range: the model has {classes} classes")
        return [part.to(reference.device) for part, reference in zip(labels, self.references, strict=True)]

    def __call__(self, outputs: Sequence[Tensor]) -> float:
        """The cost of f̂(x), ``(samples, outputs)`` per batch."""
        if self.name == "task":
            return max(0.0, self._loss(outputs) - self._float_loss)
        error = sum(self._error(*pair) for pair in zip(outputs, self.references, strict=True))
        if self.name == "kl":
            return max(0.0, error) / self.samples
        return error / self.power if self.power > 0 else 0.0

    def _error(self, outputs: Tensor, reference: Tensor) -> float:
        if outputs.shape != reference.shape:
            shapes = f"{tuple(outputs.shape)} with compressed layers and {tuple(reference.shape)} without"
            raise ModelError(
                f"the model's output has shape {shapes}: its size depends on computed values; give a forward function "
                "that returns outputs of one size"
            )
        if self.name == "nmse":
            return float((outputs - reference).double().square().sum())
        # float64: the divergence of predictions that hardly differ is a difference of nearly equal logarithms.
        found, wanted = outputs.double().log_softmax(1), reference.double().log_softmax(1)
        return float(F.kl_div(found, wanted, reduction="sum", log_target=True))

    def _loss(self, outputs: Sequence[Tensor]) -> float:
        total = 0.0
        for values, labels in zip(outputs, self.labels, strict=True):
            assert labels is not None
            if labels.is_floating_point():
                total += float((values[:, 0].double() - labels.double()).square().sum())
            else:
                total += float(F.cross_entropy(values.double(), labels.long(), reduction="sum"))
        return total / self.samples
