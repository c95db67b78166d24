"""Columns of CSV, TSV, Parquet and JSON lines tables, with the row numbers in the file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mlorq.data.contents import contents, text_of
from mlorq.data.delimited import read_rows
from mlorq.errors import DataError, one_line
from mlorq.parquet import open_parquet, read_all

MOST_ROWS = 1000  # per byte of a Parquet file; only copies of one value take less
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
    data = contents(fs, path, f"table {location}")
    numbers: Sequence[int]
    if path.endswith(".parquet"):
        found, numbers = _parquet(location, data, names)
    elif path.endswith(LINES):
        found, numbers = _json_lines(location, data, names)
    else:
        found, numbers = _delimited(location, data, path.endswith(".tsv"), names)
    if not numbers:
        raise DataError(f"table {location} is empty")
    return found, numbers


def _parquet(
    location: str, data: bytes, names: Sequence[int | str]
) -> tuple[dict[int | str, list[Any]], Sequence[int]]:
    """Columns of a Parquet file."""
    with reading(f"table {location}"):
        file = open_parquet(data)
        check_rows(file.metadata, len(data))
        table = read_all(file)
        table.validate(full=True)
    titles = table.column_names
    found: dict[int | str, list[Any]] = {}
    for name in names:
        places = [name] if isinstance(name, int) else [at for at, title in enumerate(titles) if title == name]
        if not places or not 0 <= places[0] < len(titles):
            raise DataError(f"table {location} has no column {name!r}; it has {', '.join(titles)}")
        if len(places) > 1:
            raise DataError(f"table {location} has {len(places)} columns {name!r}")
        with reading(f"table {location}"):
            found[name] = table.column(places[0]).to_pylist()
    return found, range(1, table.num_rows + 1)


@contextlib.contextmanager
def reading(origin: str) -> Iterator[None]:
    """Name a Parquet file in errors of reading it, which are of many types.

    Raises:
        DataError: the file is damaged.
    """
    try:
        yield
    except (DataError, ConnectionError, TimeoutError):  # the latter of a network: a step tries again
        raise
    except Exception as error:
        raise DataError(f"{origin} is not a Parquet file: {one_line(error) or type(error).__name__}") from error


def check_rows(metadata: pq.FileMetaData, size: int) -> None:
    """Refuse numbers of rows that a file of ``size`` bytes does not hold, before memory is taken for them.

    Raises:
        ValueError: there are too many, or the row groups have other numbers than the file.
    """
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows or metadata.num_rows > MOST_ROWS * size:
        raise ValueError(f"it says that it has {metadata.num_rows} rows, in groups of {groups!r:.100}")


def _json_lines(location: str, data: bytes, names: Sequence[int | str]) -> tuple[dict[int | str, list[Any]], list[int]]:
    """Entries of the objects of a file with one on each line; empty lines do not count."""
    lines = text_of(data, f"table {location}").split("\n")
    found: dict[int | str, list[Any]] = {name: [] for name in names}
    numbers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\" in line:
                json.dumps(row, ensure_ascii=False).encode()  # halves of characters are no text
        except (ValueError, RecursionError) as error:
            raise DataError(f"table {location}, row {number} is not JSON: {one_line(error)}") from error
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
