"""Images in a folder, local or at any fsspec URL, with labels from a table or from the names of subfolders."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from mlorq.config import ModelConfig, SourceConfig
from mlorq.data.base import Dataset
from mlorq.errors import DataError
from mlorq.hashing import digest_bytes, digest_json
from mlorq.locations import resolve_location
from mlorq.metrics import top_k_accuracy
from mlorq.models.timm import preprocessing

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
READERS = 8


@dataclass(frozen=True)
class _Image:
    path: str  # relative to the root
    label: int | None


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """Images as batches ``(samples, channels, height, width)``, preprocessed the way timm does for the model."""
    if model_config.family != "timm":
        raise DataError("source image_folder is for models of family timm; use source custom for others")
    assert source.root is not None
    root = resolve_location(source.root, folder)
    fs, path = url_to_fs(root)
    if not fs.isdir(path):
        raise DataError(f"image folder {root} does not exist")
    if source.metric not in (None, "accuracy"):
        raise DataError(f"metric {source.metric!r} does not fit image labels; choose accuracy")
    if source.split and not source.labels:
        raise DataError(f"split {source.split!r} of image folder {root} needs labels: a table with a split column")
    images = _listed(source, folder) if source.labels else _found(fs, path)
    if not images:
        raise DataError(f"image folder {root} has no images" + (f" of split {source.split!r}" if source.split else ""))
    images = _choose(images, source.samples, seed, root)
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(lambda image: _read(fs, posixpath.join(path, image.path)), images))
    described = preprocessing(model_config)
    key = digest_json(
        {
            "images": [
                [posixpath.basename(image.path), digest_bytes(data), image.label]
                for image, data in zip(images, contents, strict=True)
            ],
            "preprocessing": described,
            "batch_size": source.batch_size,
        }
    )
    labels = [image.label for image in images]
    metric = None
    if role == "evaluation" and all(label is not None for label in labels):
        metric = _Accuracy(np.array(labels))
    batches = _LazyBatches([image.path for image in images], contents, described, source.batch_size)
    known = None
    if role == "calibration" and all(label is not None for label in labels):
        known = list(torch.tensor(labels).split(source.batch_size))
    return Dataset(batches, len(images), key, "accuracy" if metric else None, metric, labels=known)


class _LazyBatches(Sequence[Tensor]):
    """Decoded and preprocessed on first use, then kept: a run that reuses everything decodes nothing."""

    def __init__(self, names: list[str], contents: list[bytes], described: dict[str, Any], size: int) -> None:
        self._names, self._contents, self._described, self._size = names, contents, described, size

    def __len__(self) -> int:
        return -(-len(self._names) // self._size)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    @cached_property
    def _batches(self) -> list[Tensor]:
        import timm.data

        names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        transform = timm.data.create_transform(
            **{name: self._described[name] for name in names if name in self._described}, is_training=False
        )
        mode = "L" if self._described["input_size"][0] == 1 else "RGB"
        with ThreadPoolExecutor(READERS) as pool:
            decoded = list(
                pool.map(lambda name, data: _decode(name, data, transform, mode), self._names, self._contents)
            )
        return list(torch.stack(decoded).split(self._size))


@dataclass(frozen=True)
class _Accuracy:
    labels: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        logits = outputs.numpy()
        bad = self.labels[(self.labels < 0) | (self.labels >= logits.shape[1])]
        if len(bad):
            raise DataError(f"image label {bad[0]} is no class of the model, which has {logits.shape[1]}")
        return {"accuracy": top_k_accuracy(logits, self.labels, 1), "top5": top_k_accuracy(logits, self.labels, 5)}


def _listed(source: SourceConfig, folder: str) -> list[_Image]:
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
            images.append(_Image(row["file"], int(row["label"])))
        except (TypeError, ValueError):
            raise DataError(
                f"label table {location}, row {number}: label {row['label']!r} is no class number"
            ) from None
    return images


def _found(fs: Any, root: str) -> list[_Image]:
    """Images under a folder; with subfolders, the sorted subfolder names are the classes."""
    files = sorted(file for file in fs.find(root) if file.lower().endswith(SUFFIXES))
    relative = [posixpath.relpath(file, root.rstrip("/")) for file in files]
    parents = sorted({posixpath.dirname(name) for name in relative})
    if "" in parents:
        return [_Image(name, None) for name in relative]
    classes = {parent: index for index, parent in enumerate(parents)}
    return [_Image(name, classes[posixpath.dirname(name)]) for name in relative]


def _choose(images: list[_Image], samples: int | None, seed: int, root: str) -> list[_Image]:
    if samples is None:
        return images
    if samples > len(images):
        raise DataError(f"image folder {root}: {samples} samples are asked for, there are {len(images)}")
    picked = np.sort(np.random.default_rng(seed).choice(len(images), samples, replace=False))
    return [images[index] for index in picked]


def _read(fs: Any, path: str) -> bytes:
    try:
        data: bytes = fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"image {path} does not exist") from None
    return data


def _decode(name: str, data: bytes, transform: Any, mode: str) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            result: Tensor = transform(image.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"image {name} cannot be decoded: {error}") from error
    return result
