"""Images in a folder, local or at any fsspec URL, with labels from a table or from the names of subfolders."""

from __future__ import annotations

import csv
import io
import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs

from mlorq.artifacts.locations import resolve_location
from mlorq.config.run import ModelConfig, SourceConfig
from mlorq.data.base import Dataset
from mlorq.data.choose import indices_of, listed_samples, seeded_choice
from mlorq.data.images import READERS, Image, check_source, image_dataset
from mlorq.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class _Named:
    path: str  # relative to the root
    label: int | None
    where: str = ""  # of the label, for errors


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """The images of a folder, all of them or those that were chosen; no other file is read."""
    check_source(source, model_config)
    assert source.root is not None
    root = resolve_location(source.root, folder)
    fs, path = url_to_fs(root)
    if not fs.isdir(path):
        raise DataError(f"image folder {root} does not exist")
    if source.split and not source.labels:
        raise DataError(f"split {source.split!r} of image folder {root} needs labels: a table with a split column")
    images = _listed(source, folder) if source.labels else _found(fs, path)
    of_split = f" of split {source.split!r}" if source.split else ""
    if not images:
        raise DataError(f"image folder {root} has no images{of_split}")
    chosen = listed_samples(source, folder)
    if chosen is None:
        picked = seeded_choice(len(images), source.samples, seed, f"image folder {root}")
    else:
        places = {image.path: index for index, image in enumerate(images)}
        picked = indices_of(chosen, places, f"image folder {root}{of_split}")
    images = [images[index] for index in picked]
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(lambda image: _read(fs, posixpath.join(path, image.path)), images))
    pairs = zip(images, contents, strict=True)
    return image_dataset(
        [Image(each.path, data, each.label, each.where, posixpath.basename(each.path)) for each, data in pairs],
        source,
        role,
        model_config,
    )


def _listed(source: SourceConfig, folder: str) -> list[_Named]:
    """Images named by a table with columns file, label and perhaps split."""
    assert source.labels is not None
    location = resolve_location(source.labels, folder)
    fs, path = url_to_fs(location)
    try:
        text = fs.cat_file(path).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"label table {location} does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"label table {location} cannot be read: {error}") from error
    rows = list(csv.DictReader(io.StringIO(text), delimiter="," if path.endswith(".csv") else "\t"))
    wanted = ("file", "label", *(("split",) if source.split else ()))
    for column in wanted:
        if not rows or column not in rows[0]:
            raise DataError(f"label table {location} has no column {column!r}")
    numbered = list(enumerate(rows, 2))
    if source.split:
        numbered = [(number, row) for number, row in numbered if row["split"] == source.split]
        if not numbered:
            splits = ", ".join(sorted({str(row["split"]) for row in rows}))
            raise DataError(f"label table {location} has no split {source.split!r}; it has {splits}")
    images = []
    for number, row in numbered:
        try:
            images.append(_Named(row["file"], int(row["label"]), f"label table {location}, row {number}"))
        except (TypeError, ValueError):
            raise DataError(
                f"label table {location}, row {number}: label {row['label']!r} is no class number"
            ) from None
    return images


def _found(fs: Any, root: str) -> list[_Named]:
    """Images under a folder; with subfolders, the sorted subfolder names are the classes."""
    files = sorted(file for file in fs.find(root) if file.lower().endswith(SUFFIXES))
    relative = [posixpath.relpath(file, root.rstrip("/")) for file in files]
    parents = sorted({posixpath.dirname(name) for name in relative})
    if "" in parents:
        return [_Named(name, None) for name in relative]
    classes = {parent: index for index, parent in enumerate(parents)}
    return [_Named(name, classes[posixpath.dirname(name)], f"image {name} (its folder)") for name in relative]


def _read(fs: Any, path: str) -> bytes:
    try:
        data: bytes = fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"image {path} does not exist") from None
    return data
