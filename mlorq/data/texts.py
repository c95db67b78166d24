"""Batches of tokens from rows of texts, with metrics; used by tables and GLUE.

For a sentence encoder each text is a sample; for a classifier each row is one, and two texts of a row are a pair. Equal
samples are run once. Samples are sorted by length, so that batches need little padding, and metrics map the outputs
back to the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset, LabelCheck, Predicted
from mlorq.data.choose import indices_of, listed_samples, row_names, seeded_choice
from mlorq.data.metrics import CLASSIFICATION, CORRELATION, TWO_CLASSES
from mlorq.data.source import ListSettings, Role, TextSettings, TokenSettings
from mlorq.errors import DataError
from mlorq.models.family import TextInputs

Text = tuple[str, ...]  # one text, or a pair that is tokenized together


@dataclass(frozen=True)
class Rows:
    """Rows of texts, with or without labels.

    Attributes:
        origin: the data set's name in errors: ``table dev.tsv``, ``GLUE task mrpc``.
        texts: one list per text column.
        labels: ``(rows,)`` class numbers or values; None without labels.
        where: maps the index of a row to the text that locates its label in errors.
        numbers: row numbers, as used in a list of samples.
        parts: ``(suffix, rows)`` of metrics that are computed for parts of the rows, such as MNLI's matched and
            mismatched ones.
        to_model: the model's class number of each class of the labels; None if they are equal.
    """

    origin: str
    texts: list[list[str]]
    labels: np.ndarray | None
    where: Callable[[int], str]
    numbers: Sequence[int]
    parts: tuple[tuple[str, range], ...] = ()
    to_model: tuple[int, ...] | None = None

    def listed(self, settings: ListSettings, folder: str) -> Rows:
        """The rows in the source's list of samples; all rows without a list.

        Raises:
            DataError: a listed row is missing, or the rows come from several splits.
        """
        found = listed_samples(settings, folder)
        if found is None:
            return self
        if self.parts:
            raise DataError(f"{self.origin}: row numbers of a list are ambiguous; give the split")
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
        """The labels in the model's class numbers; labels out of range are unchanged."""
        if self.labels is None or self.to_model is None:
            return self.labels
        known = (self.labels >= 0) & (self.labels < len(self.to_model))
        return np.where(known, np.array(self.to_model)[np.where(known, self.labels, 0).astype(int)], self.labels)


def text_dataset(
    rows: Rows, settings: TextSettings, role: Role, inputs: TextInputs, folder: str, seed: int, metrics: list[str]
) -> Dataset:
    """A data set of tokenized rows.

    Args:
        rows: all rows of the source; a list of samples is applied here.
        settings: number of samples or list, maximum length, and batch size.
        role: calibration or evaluation; the latter has metrics.
        inputs: tokenizer and kind of the model.
        folder: base of relative paths.
        seed: of the choice of samples.
        metrics: names of metrics, the main one first.

    Raises:
        DataError: there are too few rows, or a metric does not fit the model.
    """
    if inputs.predicts == "target":
        raise DataError(f"{rows.origin}: the model generates texts from texts: use source table with two text columns")
    if inputs.predicts in ("tags", "answers", "choices"):
        raise DataError(f"{rows.origin}: the model tags words, answers questions or chooses: use source table")
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
            f"data.evaluation.samples is not available for {rows.origin}: metrics need all rows or a list; use list"
        )
    batches, order = tokenized(inputs.tokenizer(), chosen, settings)
    classes = metrics[0] in CLASSIFICATION
    labels, metric, known, check = rows.model_labels, None, None, None
    if labels is not None and role == "calibration":
        # The key leaves calibration labels out, so that results that do not depend on them are reused.
        if not pairs:
            row_of = {sample: row for row, sample in enumerate(samples)}
            own = [row_of[text] for text in order]
            values = torch.tensor(labels[own])
            known = list(torch.split(values.long() if classes else values.float(), settings.batch_size))
            check = LabelCheck(labels[own], lambda index: rows.where(own[index]), classes)
    elif rows.labels is not None and labels is not None:
        if pairs and len(rows.texts) != 2:
            raise DataError(
                f"{rows.origin}: metrics of a sentence encoder need two text columns; there are {len(rows.texts)}"
            )
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
    """Correlations of the cosine similarities of embedding pairs with labels."""

    names: Sequence[str]
    rows: np.ndarray  # (2, pairs): output rows of the embeddings of either side
    labels: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        found = self.predictions(outputs)
        return {name: CORRELATION[name](np.asarray(found.predictions), self.labels) for name in self.names}

    def predictions(self, outputs: Tensor) -> Predicted:
        """The cosine similarities."""
        values = outputs.double().numpy()
        left, right = values[self.rows[0]], values[self.rows[1]]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = (left * right).sum(1) / np.maximum(norms, 1e-12)
        return Predicted("values", cosine, self.labels)


@dataclass(frozen=True)
class _Classification:
    """Metrics of predicted classes or, for a regression, of predicted values."""

    names: Sequence[str]
    rows: np.ndarray
    labels: np.ndarray
    parts: Sequence[tuple[str, range]]
    to_model: tuple[int, ...] | None

    def predictions(self, outputs: Tensor) -> Predicted:
        """Class numbers of the labels, or values."""
        values = outputs.double().numpy()[self.rows]
        regression = self.names[0] in CORRELATION
        LabelCheck(self.labels, lambda _: "evaluation data", not regression).check(values.shape[1])
        two = [name for name in self.names if name in TWO_CLASSES]
        if two and values.shape[1] > 2:
            raise DataError(f"metric {two[0]!r} is for two classes; the model has {values.shape[1]}: choose accuracy")
        if regression:
            return Predicted("values", values[:, 0], self.labels)
        # Columns of the outputs in the order of the labels' class numbers.
        order = list(range(values.shape[1])) if self.to_model is None else list(self.to_model)
        return Predicted("classes", values[:, order].argmax(1), self.labels.astype(np.int64))

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        every = self.predictions(outputs)
        predicted, labels = np.asarray(every.predictions), np.asarray(every.references)
        functions: Mapping[str, Callable[..., float]] = {**CLASSIFICATION, **CORRELATION}
        found = {}
        for suffix, part in self.parts or [("", range(len(self.labels)))]:
            own = slice(part.start, part.stop)
            for name in self.names:
                found[name + suffix] = functions[name](predicted[own], labels[own])
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
    """The texts of a column.

    Raises:
        DataError: a text is missing; the first row without one is named.
    """
    for index, value in enumerate(values):
        if value is None:
            raise DataError(f"{where(index)}: the text is missing")
    return [str(value) for value in values]


def checked_labels(values: Sequence[Any], where: Callable[[int], str], *, classes: bool) -> np.ndarray:
    """The class numbers or values of a column, ``(rows,)`` float64.

    Raises:
        DataError: a label is not a class number or a finite number; the first row with one is named.
    """
    labels = np.empty(len(values))
    for index, value in enumerate(values):
        try:
            labels[index] = float(value)
        except (TypeError, ValueError, OverflowError):
            labels[index] = np.nan
        if not np.isfinite(labels[index]) or (classes and labels[index] % 1):
            raise DataError(
                f"{where(index)}: label {value!r:.100} is not a {'class number' if classes else 'finite number'}"
            )
    return labels


def tokenized(tokens: Any, texts: list[Text], settings: TokenSettings) -> tuple[list[dict[str, Tensor]], list[Text]]:
    """Batches of tokens sorted by length, and the texts in the same order.

    Args:
        tokens: the tokenizer.
        texts: texts, or pairs of them that are tokenized together.
        settings: maximum length and batch size.
    """
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
