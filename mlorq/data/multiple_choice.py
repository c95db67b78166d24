"""Rows with choices as batches for models of task ``multiple-choice``; used by tables.

The inputs are ``(samples, choices, tokens)``: each choice with its context is a pair of texts. The rows of a batch have
the same number of choices, so that nothing but tokens is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset, Predicted
from mlorq.data.choices import ChoiceRow
from mlorq.data.metrics import CLASSIFICATION
from mlorq.data.source import Role, TextSettings
from mlorq.errors import DataError
from mlorq.models.family import TextInputs

ACCURACY = "accuracy"


def multiple_choice_dataset(
    rows: Sequence[ChoiceRow], settings: TextSettings, role: Role, inputs: TextInputs
) -> Dataset:
    """A data set of rows with choices.

    Args:
        rows: the chosen rows.
        settings: with the maximum length in tokens, the batch size and the metric.
        role: calibration, or evaluation with the metric ``accuracy``.
        inputs: the model's tokenizer.

    Raises:
        DataError: the metric does not fit.
    """
    metric = settings.metric or ACCURACY
    if metric != ACCURACY:
        raise DataError(f"metric {metric!r} does not fit multiple choice; choose {ACCURACY}")
    tokenizer = inputs.tokenizer()
    encoded = tokenizer(
        [context.strip() for row in rows for context in row.contexts],
        [choice.strip() for row in rows for choice in row.choices],
        truncation=True,
        max_length=min(settings.max_length, tokenizer.model_max_length),
    )
    sequences: list[list[dict[str, Any]]] = []
    first = 0
    for row in rows:
        places = range(first, first + len(row.choices))
        sequences.append([{name: values[place] for name, values in encoded.items()} for place in places])
        first += len(places)

    def size(index: int) -> tuple[int, int]:
        return len(sequences[index]), max(len(one["input_ids"]) for one in sequences[index])

    batches, parts = [], []
    part: list[int] = []
    for index in sorted(range(len(rows)), key=size):
        if part and (len(part) == settings.batch_size or size(part[0])[0] != size(index)[0]):
            parts.append(part)
            part = []
        part.append(index)
    parts.append(part)
    for part in parts:
        flat = [one for index in part for one in sequences[index]]
        padded = tokenizer.pad(
            {name: [one[name] for one in flat] for name in flat[0]},
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        batches.append({name: value.view(len(part), -1, value.shape[-1]) for name, value in padded.items()})
    described: dict[str, Any] = {"batches": [digest_batch(batch) for batch in batches]}
    known = [[row.right for index in part if (row := rows[index]).right is not None] for part in parts]
    if sum(map(len, known)) < len(rows):
        return Dataset(batches, len(rows), digest_json(described))
    if role == "calibration":  # the key leaves labels out, so that results that do not depend on them are reused
        return Dataset(batches, len(rows), digest_json(described), labels=[torch.tensor(own) for own in known])
    described |= {"metric": metric, "labels": known}
    counts = np.array([len(rows[index].choices) for part in parts for index in part])
    right = np.array([label for own in known for label in own])
    return Dataset(batches, len(rows), digest_json(described), metric, _Accuracy(right, counts))


@dataclass(frozen=True)
class _Accuracy:
    """Share of rows whose right choice has the largest logit.

    Attributes:
        labels: ``(samples,)`` indices of the right choices.
        counts: ``(samples,)`` numbers of choices; outputs behind them are padding.
    """

    labels: np.ndarray
    counts: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        return {ACCURACY: CLASSIFICATION[ACCURACY](np.asarray(self.predictions(outputs).predictions), self.labels)}

    def predictions(self, outputs: Tensor) -> Predicted:
        """Indices of the choices with the largest logits."""
        values = outputs.double().numpy()
        known = np.arange(values.shape[1]) < self.counts[:, None]
        return Predicted("classes", np.where(known, values, -np.inf).argmax(1), self.labels)
