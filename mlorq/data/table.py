"""Texts in a CSV, TSV or Parquet table, tokenized for the model."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from mlorq.config import ModelConfig, SourceConfig
from mlorq.data.base import Dataset
from mlorq.errors import DataError
from mlorq.hashing import digest_batch, digest_json
from mlorq.locations import resolve_location
from mlorq.metrics import CLASSIFICATION, CORRELATION, TWO_CLASSES
from mlorq.models.transformers import tokenizer

Text = tuple[str, ...]  # one text, or a pair that is read together


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """Texts as batches of token tensors, ordered by length so that little of a batch is padding.

    For a sentence encoder every text is a sample; for a classifier every row is one, two text columns a pair.
    """
    if model_config.family != "transformers":
        raise DataError("source table is for models of family transformers; use source custom for others")
    assert source.path is not None
    assert source.text is not None
    location = resolve_location(source.path, folder)
    pairs = model_config.task == "sentence-similarity"
    if not source.text:
        raise DataError("text of source table names no column")
    if not pairs and len(source.text) > 2:
        raise DataError("a classifier reads one text column or two")
    columns, numbers = _columns(location, [*source.text, *([] if source.label is None else [source.label])])
    texts = [_texts(columns[name], numbers, name, location) for name in source.text]
    name = source.metric or ("spearman" if pairs else "accuracy")
    samples: list[Text]
    if pairs:
        samples = [(text,) for column in texts for text in column]
    else:
        samples = list(zip(*texts, strict=True))
    unique = list(dict.fromkeys(samples))
    if role == "calibration" or source.samples is None:
        chosen = _choose(unique, source.samples, seed, location) if role == "calibration" else unique
    else:
        raise DataError("data.evaluation.samples is not available for source table")
    labels = None
    if source.label is not None and (role == "evaluation" or not pairs):
        labels = _labels(columns[source.label], numbers, source.label, location, classes=name in CLASSIFICATION)
    tokens = tokenizer(model_config, folder)
    batches, order = _tokenize(tokens, chosen, source)
    metric = None
    known = None
    if labels is not None and role == "calibration":
        # No part of the key: what does not look at labels is reused whatever they are.
        of_text = dict(zip(samples, labels.tolist(), strict=True))
        values = torch.tensor([of_text[text] for text in order])
        known = list((values.long() if name in CLASSIFICATION else values).split(source.batch_size))
        labels = None
    if labels is not None:
        if pairs and len(texts) != 2:
            raise DataError("a sentence encoder's metric needs two text columns")
        place = {text: row for row, text in enumerate(order)}
        rows = np.array([place[sample] for sample in samples])
        metric = _metric(name, pairs, rows, labels)
    key = digest_json(
        {
            "texts": [list(text) for text in order],
            "labels": None if labels is None else [labels.tolist(), [list(sample) for sample in samples], name],
            "batches": [digest_batch(batch) for batch in batches],
        }
    )
    return Dataset(batches, len(order), key, name if metric else None, metric, labels=known)


@dataclass(frozen=True)
class _Similarity:
    """A correlation of cosine similarities with labels."""

    name: str
    rows: np.ndarray  # (2, pairs): where either side's embedding is among the outputs
    labels: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        values = outputs.double().numpy()
        left, right = values[self.rows[0]], values[self.rows[1]]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = (left * right).sum(1) / np.maximum(norms, 1e-12)
        return {self.name: CORRELATION[self.name](cosine, self.labels)}


@dataclass(frozen=True)
class _Classification:
    """A metric of predicted classes, or of a regressor's values."""

    name: str
    rows: np.ndarray
    labels: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        values = outputs.double().numpy()[self.rows]
        if self.name in CORRELATION:
            return {self.name: CORRELATION[self.name](values[:, 0], self.labels)}
        bad = self.labels[(self.labels < 0) | (self.labels >= values.shape[1])]
        if len(bad):
            raise DataError(f"label {bad[0]:g} is no class of the model, which has {values.shape[1]}")
        if self.name in TWO_CLASSES and values.shape[1] > 2:
            raise DataError(f"metric {self.name!r} is for two classes, the model has {values.shape[1]}")
        return {self.name: CLASSIFICATION[self.name](values.argmax(1), self.labels.astype(np.int64))}


def _metric(name: str, pairs: bool, rows: np.ndarray, labels: np.ndarray) -> _Similarity | _Classification:
    if not pairs:
        return _Classification(name, rows, labels)
    if name not in CORRELATION:
        raise DataError(f"metric {name!r} does not fit a sentence encoder; choose {' or '.join(CORRELATION)}")
    return _Similarity(name, rows.reshape(2, -1), labels)


def _columns(location: str, names: Sequence[int | str]) -> tuple[dict[int | str, list[Any]], Sequence[int]]:
    """Columns of a table, by number where it has no header, else by name, and the number of each row in the file.

    Raises:
        DataError: the file is missing or empty, or has no such column.
    """
    fs, path = url_to_fs(location)
    try:
        data = fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"table {location} does not exist") from None
    if path.endswith(".parquet"):
        try:
            table = pq.read_table(io.BytesIO(data))
        except (OSError, ValueError) as error:
            raise DataError(f"table {location} is no Parquet file: {error}") from error
        known = {name: table[name].to_pylist() for name in table.column_names}
        known |= {index: table.column(index).to_pylist() for index in range(table.num_columns)}
        for name in names:
            if name not in known:
                raise DataError(f"table {location} has no column {name!r}; it has {', '.join(table.column_names)}")
        found = {name: known[name] for name in names}
        numbers: Sequence[int] = range(1, table.num_rows + 1)
    else:
        found, numbers = _delimited(location, data, path.endswith(".tsv"), names)
    if not numbers:
        raise DataError(f"table {location} is empty")
    return found, numbers


def _delimited(
    location: str, data: bytes, tabs: bool, names: Sequence[int | str]
) -> tuple[dict[int | str, list[Any]], list[int]]:
    # Quotes are text in tab-separated files (GLUE's), and delimiters of fields in comma-separated ones.
    quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig")), delimiter="\t" if tabs else ",", quoting=quoting)
        rows = [(number, row) for number, row in enumerate(reader, 1) if row]  # blank lines hold nothing
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"table {location} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"table {location} is empty")
    by_name = any(isinstance(name, str) for name in names)
    titles = rows[0][1]
    header = {name: index for index, name in enumerate(titles)} if by_name else {}
    rows = rows[1 if by_name else 0 :]
    found: dict[int | str, list[Any]] = {}
    for name in names:
        column = header.get(name) if isinstance(name, str) else name
        if column is None or column < 0:
            raise DataError(f"table {location} has no column {name!r}; it has {', '.join(titles)}")
        values = []
        for number, row in rows:
            if column >= len(row):
                raise DataError(f"table {location}, row {number}: there is no column {name!r}, only {len(row)} columns")
            values.append(row[column])
        found[name] = values
    return found, [number for number, _ in rows]


def _texts(values: Sequence[Any], numbers: Sequence[int], column: int | str, location: str) -> list[str]:
    for number, value in zip(numbers, values, strict=True):
        if value is None:
            raise DataError(f"table {location}, row {number}, column {column!r}: there is no text")
    return [str(value) for value in values]


def _labels(
    values: Sequence[Any], numbers: Sequence[int], column: int | str, location: str, *, classes: bool
) -> np.ndarray:
    labels = np.empty(len(values))
    for index, (number, value) in enumerate(zip(numbers, values, strict=True)):
        try:
            labels[index] = float(value)
        except (TypeError, ValueError):
            labels[index] = np.nan
        if not np.isfinite(labels[index]) or (classes and labels[index] % 1):
            what = "class number" if classes else "number"
            raise DataError(f"table {location}, row {number}, column {column!r}: label {value!r} is no {what}")
    return labels


def _choose(texts: list[Text], samples: int | None, seed: int, location: str) -> list[Text]:
    if samples is None:
        return texts
    if samples > len(texts):
        raise DataError(f"table {location}: {samples} samples are asked for, there are {len(texts)} different ones")
    picked = np.sort(np.random.default_rng(seed).choice(len(texts), samples, replace=False))
    return [texts[index] for index in picked]


def _tokenize(tokens: Any, texts: list[Text], source: SourceConfig) -> tuple[list[dict[str, Tensor]], list[Text]]:
    """Batches in the order of length, and the texts in that order."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokens(*columns, truncation=True, max_length=min(source.max_length, tokens.model_max_length))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda index: (lengths[index], index))
    batches = []
    for start in range(0, len(order), source.batch_size):
        part = order[start : start + source.batch_size]
        rows = {name: [values[index] for index in part] for name, values in encoded.items()}
        batches.append(dict(tokens.pad(rows, padding=True, return_tensors="pt")))
    return batches, [texts[index] for index in order]
