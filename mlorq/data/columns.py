"""Columns of CSV, TSV, Parquet and JSON lines tables, with the row numbers in the file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mlorq.data.delimited import read_rows
from mlorq.errors import DataError

LINES = (".jsonl", ".ndjson")


def read_columns(location: str, names: Sequence[int | str]) -> tuple[dict[int | str, list[Any]], Sequence[int]]:
    """Columns of a table, and the number of each row in the file, counted from 1.

    Args:
        location: local path or fsspec URL.
        names: columns by name, or by number from 0. A CSV or TSV table has a header if any of them is a name.

    Raises:
        DataError: the file is missing, empty or malformed, or a column is missing.
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
            raise DataError(f"table {location} is not a Parquet file: {error}") from error
        known = {name: table[name].to_pylist() for name in table.column_names}
        known |= {index: table.column(index).to_pylist() for index in range(table.num_columns)}
        for name in names:
            if name not in known:
                raise DataError(f"table {location} has no column {name!r}; it has {', '.join(table.column_names)}")
        found = {name: known[name] for name in names}
        numbers: Sequence[int] = range(1, table.num_rows + 1)
    elif path.endswith(LINES):
        found, numbers = _json_lines(location, data, names)
    else:
        found, numbers = _delimited(location, data, path.endswith(".tsv"), names)
    if not numbers:
        raise DataError(f"table {location} is empty")
    return found, numbers


def _json_lines(location: str, data: bytes, names: Sequence[int | str]) -> tuple[dict[int | str, list[Any]], list[int]]:
    """Entries of the objects of a file with one on each line; empty lines do not count."""
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"table {location} cannot be read: {error}") from error
    found: dict[int | str, list[Any]] = {name: [] for name in names}
    numbers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"table {location}, row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"table {location}, row {number} is not a JSON object")
        for name in names:
            if name not in row:
                raise DataError(f"table {location}, row {number} has no entry {name!r}; it has {', '.join(row)}")
            found[name].append(row[name])
        numbers.append(number)
    return found, numbers


def _delimited(
    location: str, data: bytes, tabs: bool, names: Sequence[int | str]
) -> tuple[dict[int | str, list[Any]], list[int]]:
    # In tab-separated files (GLUE) quotes are part of the text; in comma-separated ones they delimit fields.
    rows = read_rows(data, f"table {location}", tabs=tabs, quotes=not tabs)
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
                raise DataError(
                    f"table {location}, row {number}: column {name!r} is missing; the row has {len(row)} columns"
                )
            values.append(row[column])
        found[name] = values
    return found, [number for number, _ in rows]
