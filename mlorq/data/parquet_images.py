"""Reader of encoded images in Parquet shards of the hub's layout: a column ``{bytes, path}`` and one of class numbers.

Rows are chosen by number, counted from 1 over all shards in the order of their names. The footers give the row group of
each row; only the two columns of row groups with chosen rows are read, one group at a time per shard.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import READERS, indices_of, listed_samples, parquet_files, row_names, seeded_choice
from mlorq.data.columns import check_rows, reading
from mlorq.data.image_parquet import ImageParquetSettings
from mlorq.data.images import Image
from mlorq.data.source import Role
from mlorq.errors import DataError
from mlorq.parquet import open_parquet, read_all, read_group

LABEL = "label"  # the column's usual name on the hub
LARGEST = 2**31  # class number
HIDDEN = -1  # the hub's label in splits with secret labels


@dataclass(frozen=True)
class _Shard:
    path: str
    first: int  # number of rows in the earlier shards
    groups: tuple[int, ...]  # rows of each row group
    bytes_column: str
    path_column: str | None
    label: str | None

    @property
    def rows(self) -> int:
        return sum(self.groups)

    def where(self, row: int) -> str:
        """File and row, counted from 1, for errors."""
        return f"{posixpath.basename(self.path)}, row {row + 1}"


def read_images(settings: ImageParquetSettings, role: Role, folder: str, seed: int) -> list[Image]:
    """The chosen images of a file, a folder of shards or a glob.

    Labels are None for calibration data from a split with secret labels.

    Raises:
        DataError: a file, row or column is missing or malformed, or evaluation data has secret labels.
    """
    assert settings.path is not None
    location = resolve_location(settings.path, folder)
    origin = f"images {location}" + (f" of split {settings.split!r}" if settings.split else "")
    fs, files = parquet_files(location, settings.split)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda file: _shard(fs, file, settings), files))
    shards, total = [], 0
    for shard in found:
        shards.append(_Shard(**{**vars(shard), "first": total}))
        total += shard.rows
    if not total:
        raise DataError(f"{origin} has no rows")
    listed = listed_samples(settings, folder)
    if listed is None:
        picked = seeded_choice(total, settings.samples, seed, origin)
    else:
        picked = _listed_rows(fs, shards, listed, total, origin)
    starts = np.array([shard.first for shard in shards])
    owner = np.searchsorted(starts, np.array(picked), side="right") - 1
    wanted: dict[int, list[int]] = {}
    for row, index in zip(picked, owner.tolist(), strict=True):
        wanted.setdefault(index, []).append(row - shards[index].first)
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda item: _read(fs, shards[item[0]], item[1]), wanted.items()))
    of_row = {
        shards[index].first + row: image
        for index, part in zip(wanted, parts, strict=True)
        for row, image in part.items()
    }
    images = [of_row[row] for row in picked]
    hidden = next((image for image in images if image.label == HIDDEN), None)
    if hidden is not None:
        if role == "evaluation":
            raise DataError(f"{hidden.where}: label -1: the labels of this split are secret; choose another split")
        images = [replace(image, label=None) for image in images]
    return images


def _open(fs: Any, path: str) -> pq.ParquetFile:
    with reading(path):
        return open_parquet(fs.open(path, "rb"))


def _shard(fs: Any, path: str, settings: ImageParquetSettings) -> _Shard:
    """The description of a shard, from its footer."""
    with _open(fs, path) as file, reading(path):
        schema, metadata = file.schema_arrow, file.metadata
        check_rows(metadata, fs.size(path))
        groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    columns = ", ".join(schema.names)
    twice = [name for name in (settings.image, settings.label or LABEL) if schema.names.count(str(name)) > 1]
    if twice:
        raise DataError(f"{path} has several columns {twice[0]!r}")
    if settings.image not in schema.names:
        raise DataError(f"{path} has no column {settings.image!r} of images; it has {columns}")
    kind = schema.field(settings.image).type
    fields = [kind.field(index).name for index in range(kind.num_fields)] if pa.types.is_struct(kind) else None
    if fields is None and not _is_binary(kind):
        raise DataError(f"{path}, column {settings.image!r} holds {kind} instead of encoded images")
    if fields is not None and ("bytes" not in fields or not _is_binary(kind.field("bytes").type)):
        raise DataError(f"{path}, column {settings.image!r} has no field 'bytes' of encoded images")
    label = None if settings.label is None else str(settings.label)
    if label is None and LABEL in schema.names:
        label = LABEL
    if label is not None and label not in schema.names:
        raise DataError(f"{path} has no column {label!r} of labels; it has {columns}")
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{path}, column {label!r} holds {schema.field(label).type} instead of class numbers")
    return _Shard(
        path,
        0,
        groups,
        settings.image if fields is None else f"{settings.image}.bytes",
        f"{settings.image}.path" if fields is not None and "path" in fields else None,
        label,
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read(fs: Any, shard: _Shard, rows: Sequence[int]) -> dict[int, Image]:
    """Some rows of a shard."""
    columns = [shard.bytes_column, *([] if shard.label is None else [shard.label])]
    found: dict[int, Image] = {}
    with _open(fs, shard.path) as file, reading(shard.path):
        first = 0
        for group, count in enumerate(shard.groups):
            own = sorted(row for row in rows if first <= row < first + count)
            if own:
                table = read_group(file, group, columns)
                table.validate(full=True)
                table = table.take([row - first for row in own])
                contents = table.column(0).combine_chunks()
                if pa.types.is_struct(contents.type):
                    contents = contents.field("bytes")
                labels = table[shard.label].to_pylist() if shard.label is not None else [None] * len(own)
                for row, content, label in zip(own, contents, labels, strict=True):
                    found[row] = _image(shard, row, content.as_py(), label)
            first += count
    return found


def _image(shard: _Shard, row: int, data: bytes | None, label: int | None) -> Image:
    where = shard.where(row)
    if data is None:
        raise DataError(f"{where}: the image has a path but no bytes; store the encoded images in the table")
    if shard.label is not None and label is None:
        raise DataError(f"{where}: the label is missing")
    if label is not None and abs(label) >= LARGEST:
        raise DataError(f"{where}: label {label} is not a class number")
    return Image(where, data, label, f"{where}, column {shard.label!r}")


def _listed_rows(
    fs: Any, shards: Sequence[_Shard], listed: tuple[str, list[str]], total: int, origin: str
) -> list[int]:
    """The rows in a list of samples, by number or by the path stored with an image."""
    if all(name.isdigit() for name in listed[1]):
        return indices_of(listed, row_names(range(1, total + 1)), origin)
    known: dict[str, int] = {}
    for shard in shards:
        if shard.path_column is None:
            continue
        with _open(fs, shard.path) as file, reading(shard.path):
            column = read_all(file, [shard.path_column]).column(0).combine_chunks()
            names = (column.field("path") if pa.types.is_struct(column.type) else column).to_pylist()
        for row, name in enumerate(names):
            if name in known and name in listed[1]:
                raise DataError(f"list {listed[0]}: two images have the path {name!r}; give row numbers")
            if name is not None:
                known[name] = shard.first + row
    return indices_of(listed, {**row_names(range(1, total + 1)), **known}, origin)
