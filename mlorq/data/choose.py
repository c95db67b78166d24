"""Which samples of a source are used: a seeded choice of some, or an explicit list, and where Parquet shards are.

A list is a text file with one sample per line, by its name or by its row number. Row numbers are those that errors
name: they count from 1 and, in a CSV or TSV file, the header is row 1.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fsspec.core import url_to_fs

from mlorq.artifacts.locations import resolve_location
from mlorq.data.source import ListSettings
from mlorq.errors import DataError

READERS = 8  # threads that wait for a file system


def seeded_choice(count: int, samples: int | None, seed: int, origin: str, what: str = "") -> Sequence[int]:
    """Indices of ``samples`` of ``count`` things, in order; all of them for None.

    Args:
        count: how many there are.
        samples: how many are wanted.
        seed: of the choice.
        origin: where they are from, for the error.
        what: what they are, for the error.

    Raises:
        DataError: there are fewer.
    """
    if samples is None:
        return range(count)
    if samples > count:
        raise DataError(f"{origin}: {samples} samples are asked for, there are {count}{what}")
    import numpy as np

    picked: list[int] = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False)).tolist()
    return picked


def listed_samples(settings: ListSettings, folder: str) -> tuple[str, list[str]] | None:
    """Where a source's list is, and its lines; None without a list.

    Raises:
        DataError: the file is missing, not text, or empty, or names a sample twice.
    """
    if settings.list is None:
        return None
    location = resolve_location(settings.list, folder)
    fs, path = url_to_fs(location)
    try:
        lines = fs.cat_file(path).decode("utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"list {location} does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"list {location} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"list {location} is empty")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"list {location} names {twice!r} twice")
    return location, names


def indices_of(listed: tuple[str, list[str]], known: Mapping[str, int], origin: str) -> list[int]:
    """Where the samples of a list are, in the list's order.

    Args:
        listed: the list's place and lines.
        known: ``{name or row number: index}``.
        origin: of the samples, for the error.

    Raises:
        DataError: names the first sample that is not there.
    """
    location, names = listed
    for name in names:
        if name not in known:
            raise DataError(f"list {location}: {origin} has no sample {name!r}")
    return [known[name] for name in names]


def row_names(numbers: Sequence[int]) -> dict[str, int]:
    """``{row number: index}`` of rows that have no names."""
    return {str(number): index for index, number in enumerate(numbers)}


def parquet_files(location: str, split: str | None) -> tuple[Any, list[str]]:
    """The Parquet files of a location, sorted, with their file system.

    A location is one file, a folder of shards or a glob. A split's shards are told by their names, as the hub writes
    them (``validation-00000-of-00002.parquet``, ``validation.parquet``), or by a folder of the split's name.

    Raises:
        DataError: there are none, or none of that split.
    """
    fs, path = url_to_fs(location)
    if any(mark in path for mark in "*?["):
        files = sorted(fs.glob(path))
        root = posixpath.dirname(path[: min(path.index(mark) for mark in "*?[" if mark in path)])
    elif fs.isdir(path):
        files, root = sorted(fs.find(path)), path
    elif fs.isfile(path):
        return fs, [path]
    else:
        raise DataError(f"{location} does not exist")
    files = [file for file in files if file.endswith(".parquet")]
    if not files:
        raise DataError(f"{location} has no Parquet files")
    if split is None:
        return fs, files
    found = [file for file in files if split in _splits_of(posixpath.relpath(file, root or "/"))]
    if not found:
        known = sorted({_splits_of(posixpath.relpath(file, root or "/"))[0] for file in files})
        raise DataError(f"{location} has no Parquet files of split {split!r}; it has {', '.join(known)}")
    return fs, found


def _splits_of(name: str) -> list[str]:
    """What a shard's split may be called: by its file name, then by the folders that it is in."""
    *folders, file = name.split("/")
    return [re.sub(r"(-\d+-of-\d+.*)?\.parquet$", "", file), *folders]


def before_glob(location: str | None) -> str | None:
    """The folder that a glob starts from; other locations as they are."""
    if location is None or not re.search(r"[*?\[]", location):
        return location
    return re.split(r"[*?\[]", location, maxsplit=1)[0].rpartition("/")[0] or "."
