"""Texts in a CSV, TSV or Parquet table, tokenized for the model."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mlorq.artifacts.locations import resolve_location
from mlorq.config.run import ModelConfig, SourceConfig
from mlorq.data.base import Dataset, required
from mlorq.data.metrics import CLASSIFICATION
from mlorq.data.texts import Rows, checked_labels, checked_texts, text_dataset
from mlorq.errors import DataError
from mlorq.models.family import FAMILIES, TextInputs


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """The texts of a table's columns, and its labels."""
    inputs = required(FAMILIES[model_config.family].text_inputs(model_config.own, folder), source.source, "texts")
    assert source.path is not None
    assert source.text is not None
    location = resolve_location(source.path, folder)
    pairs = inputs.pairs
    if not source.text:
        raise DataError("text of source table names no column")
    if not pairs and len(source.text) > 2:
        raise DataError("a classifier reads one text column or two")
    columns, numbers = read_columns(location, [*source.text, *([] if source.label is None else [source.label])])

    def where(column: int | str, index: int) -> str:
        return f"table {location}, row {numbers[index]}, column {column!r}"

    texts = [checked_texts(columns[name], partial(where, name)) for name in source.text]
    name = source.metric or _usual_metric(source, inputs)
    labels = None
    if source.label is not None and (role == "evaluation" or not pairs):
        labels = checked_labels(columns[source.label], partial(where, source.label), classes=name in CLASSIFICATION)
    rows = Rows(f"table {location}", texts, labels, partial(where, source.label or ""), numbers)
    return text_dataset(rows, source, role, model_config, folder, seed, [name])


def _usual_metric(source: SourceConfig, inputs: TextInputs) -> str:
    if inputs.pairs:
        return "spearman"
    if source.label is None:
        return "accuracy"
    return "pearson" if len(inputs.class_names()) == 1 else "accuracy"


def read_columns(location: str, names: Sequence[int | str]) -> tuple[dict[int | str, list[Any]], Sequence[int]]:
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
