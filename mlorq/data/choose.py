"""Selection of a source's files and samples: a seeded choice, an explicit list, and the Parquet shards of a split.

A list is a text file that gives one sample per line, by its name or by its row number. Row numbers are the same as in
error messages: they count from 1, and the header of a CSV or TSV file is row 1.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fsspec.core import url_to_fs

from mlorq.artifacts.locations import resolve_location
from mlorq.data.contents import contents, text_of
from mlorq.data.source import ListSettings
from mlorq.errors import DataError

READERS = 8  # threads that read files


def seeded_choice(count: int, samples: int | None, seed: int, origin: str, kind: str = "") -> Sequence[int]:
    """Indices of a random choice of samples, in ascending order; all indices if ``samples`` is None.

    Args:
        count: number of samples to choose from.
        samples: number of samples to choose.
        seed: of the choice.
        origin: the data set's name in the error.
        kind: what is counted, in the error, with a space before it.

    Raises:
        DataError: ``count`` is less than ``samples``.
    """
    if samples is None:
        return range(count)
    if samples > count:
        raise DataError(f"{origin}: {samples} samples are requested, but there are only {count}{kind}")
    import numpy as np

    picked: list[int] = np.sort(np.random.default_rng(seed).choice(count, samples, replace=False)).tolist()
    return picked


def listed_samples(settings: ListSettings, folder: str) -> tuple[str, list[str]] | None:
    """Location and lines of a source's list of samples; None without a list.

    Raises:
        DataError: the file is missing, not text, or empty, or lists a sample twice.
    """
    if settings.list is None:
        return None
    location = resolve_location(settings.list, folder)
    fs, path = url_to_fs(location)
    lines = text_of(contents(fs, path, f"list {location}"), f"list {location}").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"list {location} is empty")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"list {location} contains {twice!r} twice")
    return location, names


def indices_of(listed: tuple[str, list[str]], known: Mapping[str, int], origin: str) -> list[int]:
    """Indices of a list's samples, in the order of the list.

    Args:
        listed: location and lines of the list.
        known: ``{name or row number: index}``.
        origin: the data set's name in the error.

    Raises:
        DataError: a sample is missing; the first one is named.
    """
    location, names = listed
    for name in names:
        if name not in known:
            raise DataError(f"list {location}: {origin} has no sample {name!r}")
    return [known[name] for name in names]


def row_names(numbers: Sequence[int]) -> dict[str, int]:
    """``{row number: index}`` for rows without names."""
    return {str(number): index for index, number in enumerate(numbers)}


def chosen_rows(settings: ListSettings, numbers: Sequence[int], origin: str, folder: str, seed: int) -> Sequence[int]:
    """Indices of the rows that a source uses: those of its list, or a seeded choice.

    Args:
        settings: list or number of samples.
        numbers: row numbers in the file.
        origin: the data set's name in errors.
        folder: base of relative paths.
        seed: of the choice.

    Raises:
        DataError: a listed row is missing, or there are too few.
    """
    listed = listed_samples(settings, folder)
    if listed is None:
        return seeded_choice(len(numbers), settings.samples, seed, origin)
    return indices_of(listed, row_names(numbers), origin)


def parquet_files(location: str, split: str | None) -> tuple[Any, list[str]]:
    """The Parquet files of a location, sorted, with their file system.

    A location is one file, a folder of shards or a glob. Shards belong to a split if their file names begin with it, as
    on the hub (``validation-00000-of-00002.parquet``, ``validation.parquet``), or if a folder has the split's name.

    Raises:
        DataError: the location does not exist, or has no Parquet files (of that split).
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
    """Possible names of a shard's split: from its file name, then from its folders."""
    *folders, file = name.split("/")
    return [re.sub(r"(-\d+-of-\d+.*)?\.parquet$", "", file), *folders]


def read_image(fs: Any, path: str) -> bytes:
    """The encoded bytes of an image file.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    return contents(fs, path, f"image {path}")


def before_glob(location: str | None) -> str | None:
    """The folder before a glob's first pattern; other locations unchanged."""
    if location is None or not re.search(r"[*?\[]", location):
        return location
    return re.split(r"[*?\[]", location, maxsplit=1)[0].rpartition("/")[0] or "."
