"""Rows of texts as batches of tokens, and the metrics of what a model makes of them; tables and GLUE both end here.

For a sentence encoder every text is a sample; for a classifier every row is one, two texts of it a pair. A text is run
once, however often it occurs, and batches are ordered by length so that little of them is padding: ``order`` maps back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset, LabelCheck
from mlorq.data.choose import indices_of, listed_samples, row_names, seeded_choice
from mlorq.data.metrics import CLASSIFICATION, CORRELATION, TWO_CLASSES
from mlorq.data.source import ListSettings, Role, TextSettings
from mlorq.errors import DataError
from mlorq.models.family import TextInputs

Text = tuple[str, ...]  # one text, or a pair that is read together


@dataclass(frozen=True)
class Rows:
    """Rows of texts, perhaps with labels.

    Attributes:
        origin: what they are from, for errors: ``table dev.tsv``, ``GLUE task mrpc``.
        texts: one list per text column.
        labels: ``(rows,)`` numbers; None where there are none.
        where: names a row's label in errors.
        numbers: the rows' numbers in a list of samples.
        parts: ``(suffix, rows)`` of a metric that is taken of parts of the rows, as matched and mismatched.
        to_model: the model's class of each class of the labels; None: they are the same.
    """

    origin: str
    texts: list[list[str]]
    labels: np.ndarray | None
    where: Callable[[int], str]
    numbers: Sequence[int]
    parts: tuple[tuple[str, range], ...] = ()
    to_model: tuple[int, ...] | None = None

    def listed(self, settings: ListSettings, folder: str) -> Rows:
        """The rows that a source's list names; all of them without one.

        Raises:
            DataError: a row is not there.
        """
        found = listed_samples(settings, folder)
        if found is None:
            return self
        if self.parts:
            raise DataError(f"list and {self.origin}: give the split that the list is about")
        rows = indices_of(found, row_names(self.numbers), self.origin)
        return Rows(
            self.origin,
            [[column[row] for row in rows] for column in self.texts],
            None if self.labels is None else self.labels[rows],
            lambda index: self.where(rows[index]),
            [self.numbers[row] for row in rows],
            to_model=self.to_model,
        )

    @property
    def model_labels(self) -> np.ndarray | None:
        """The labels as the model numbers its classes; those that are no class at all stay as they are."""
        if self.labels is None or self.to_model is None:
            return self.labels
        known = (self.labels >= 0) & (self.labels < len(self.to_model))
        return np.where(known, np.array(self.to_model)[np.where(known, self.labels, 0).astype(int)], self.labels)


def text_dataset(
    rows: Rows, settings: TextSettings, role: Role, inputs: TextInputs, folder: str, seed: int, metrics: list[str]
) -> Dataset:
    """Rows of texts as a data set.

    Args:
        rows: of texts; the source's list is taken into account here.
        settings: how many samples, how long they are, and the batch size.
        role: calibration or evaluation; the latter has metrics.
        inputs: how the model reads texts.
        folder: where relative paths start.
        seed: of the choice of samples.
        metrics: their names, the one that stands for the task first.

    Raises:
        DataError: there are too few rows, or a metric does not fit.
    """
    rows = rows.listed(settings, folder)
    pairs = inputs.pairs
    samples: list[Text]
    if pairs:
        samples = [(text,) for column in rows.texts for text in column]
    else:
        samples = list(zip(*rows.texts, strict=True))
    chosen = list(dict.fromkeys(samples))
    if role == "calibration":
        picked = seeded_choice(len(chosen), settings.samples, seed, rows.origin, " different ones")
        chosen = [chosen[index] for index in picked]
    elif settings.samples is not None:
        raise DataError(
            f"data.evaluation.samples is not available for {rows.origin}: a metric is taken of all rows, or of a list"
        )
    batches, order = _tokenize(inputs.tokenizer(), chosen, settings)
    classes = metrics[0] in CLASSIFICATION
    labels, metric, known, check = rows.model_labels, None, None, None
    if labels is not None and role == "calibration":
        # No part of the key: what does not look at labels is reused whatever they are.
        if not pairs:
            row_of = {sample: row for row, sample in enumerate(samples)}
            own = [row_of[text] for text in order]
            values = torch.tensor(labels[own])
            known = list(torch.split(values.long() if classes else values.float(), settings.batch_size))
            check = LabelCheck(labels[own], lambda index: rows.where(own[index]), classes)
    elif rows.labels is not None and labels is not None:
        if pairs and len(rows.texts) != 2:
            raise DataError("a sentence encoder's metric needs two text columns")
        place = {text: row for row, text in enumerate(order)}
        at = np.array([place[sample] for sample in samples])
        metric = _metric(rows, metrics, pairs, at)
        check = None if pairs else LabelCheck(labels, rows.where, classes)
    described = None
    if metric is not None and rows.labels is not None:
        name: Any = metrics if len(metrics) > 1 else metrics[0]
        described = [rows.labels.tolist(), [list(sample) for sample in samples], name]
        if rows.parts or rows.to_model:
            described.append([[suffix, len(part)] for suffix, part in rows.parts])
            described.append(None if rows.to_model is None else list(rows.to_model))
    key = digest_json(
        {
            "texts": [list(text) for text in order],
            "labels": described,
            "batches": [digest_batch(batch) for batch in batches],
        }
    )
    return Dataset(batches, len(order), key, metrics[0] if metric else None, metric, labels=known, label_check=check)


@dataclass(frozen=True)
class _Similarity:
    """Correlations of cosine similarities with labels."""

    names: Sequence[str]
    rows: np.ndarray  # (2, pairs): where either side's embedding is among the outputs
    labels: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        values = outputs.double().numpy()
        left, right = values[self.rows[0]], values[self.rows[1]]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = (left * right).sum(1) / np.maximum(norms, 1e-12)
        return {name: CORRELATION[name](cosine, self.labels) for name in self.names}


@dataclass(frozen=True)
class _Classification:
    """Metrics of predicted classes, or of a regressor's values."""

    names: Sequence[str]
    rows: np.ndarray
    labels: np.ndarray
    parts: Sequence[tuple[str, range]]
    to_model: tuple[int, ...] | None

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        values = outputs.double().numpy()[self.rows]
        regression = self.names[0] in CORRELATION
        LabelCheck(self.labels, lambda _: "evaluation data", not regression).check(values.shape[1])
        two = [name for name in self.names if name in TWO_CLASSES]
        if two and values.shape[1] > 2:
            raise DataError(f"metric {two[0]!r} is for two classes, the model has {values.shape[1]}")
        if regression:
            predicted = values[:, 0]
        else:
            # The classes of the labels, of which the first may be called another number by the model.
            order = list(range(values.shape[1])) if self.to_model is None else list(self.to_model)
            predicted = values[:, order].argmax(1)
        found = {}
        for suffix, part in self.parts or [("", range(len(self.labels)))]:
            own = self.labels[part.start : part.stop]
            for name in self.names:
                function = CORRELATION[name] if regression else CLASSIFICATION[name]
                found[name + suffix] = function(
                    predicted[part.start : part.stop], own if regression else own.astype(np.int64)
                )
        return found


def _metric(rows: Rows, names: Sequence[str], pairs: bool, at: np.ndarray) -> _Similarity | _Classification:
    assert rows.labels is not None
    if not pairs:
        return _Classification(names, at, rows.labels, rows.parts, rows.to_model)
    for name in names:
        if name not in CORRELATION:
            raise DataError(f"metric {name!r} does not fit a sentence encoder; choose {' or '.join(CORRELATION)}")
    return _Similarity(names, at.reshape(2, -1), rows.labels)


def checked_texts(values: Sequence[Any], where: Callable[[int], str]) -> list[str]:
    """A column of texts.

    Raises:
        DataError: names the first row without one.
    """
    for index, value in enumerate(values):
        if value is None:
            raise DataError(f"{where(index)}: there is no text")
    return [str(value) for value in values]


def checked_labels(values: Sequence[Any], where: Callable[[int], str], *, classes: bool) -> np.ndarray:
    """A column of class numbers or values, ``(rows,)`` float64.

    Raises:
        DataError: names the first row whose label is none.
    """
    labels = np.empty(len(values))
    for index, value in enumerate(values):
        try:
            labels[index] = float(value)
        except (TypeError, ValueError):
            labels[index] = np.nan
        if not np.isfinite(labels[index]) or (classes and labels[index] % 1):
            raise DataError(f"{where(index)}: label {value!r} is not a {'class number' if classes else 'number'}")
    return labels


def _tokenize(tokens: Any, texts: list[Text], settings: TextSettings) -> tuple[list[dict[str, Tensor]], list[Text]]:
    """Batches in the order of length, and the texts in that order."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokens(*columns, truncation=True, max_length=min(settings.max_length, tokens.model_max_length))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda index: (lengths[index], index))
    batches = []
    for start in range(0, len(order), settings.batch_size):
        part = order[start : start + settings.batch_size]
        rows = {name: [values[index] for index in part] for name, values in encoded.items()}
        batches.append(dict(tokens.pad(rows, padding=True, return_tensors="pt")))
    return batches, [texts[index] for index in order]
