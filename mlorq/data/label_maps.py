"""Images with label maps, for semantic segmentation: reading and checking the maps, and the mean IoU of a model.

A label map is a palette or grey PNG image of 8 or 16 bits whose pixels are class numbers. For models whose image
processor reduces labels (ADE20K), class 0 of the file is ignored and the others count from 1.

Calibration reads images alone. Evaluation runs the model on every image; the output NMSE is measured on about
``NMSE_SAMPLES`` of them, because f(x) of thousands of images would take gigabytes.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fsspec.core import url_to_fs
from torch import nn

from mlorq.artifacts.hashing import digest_bytes, digest_json
from mlorq.artifacts.locations import resolve_location
from mlorq.data.base import Dataset, LabelCheck
from mlorq.data.choose import READERS
from mlorq.data.contents import contents
from mlorq.data.images import Image, PreparedBatches
from mlorq.data.metrics import MIOU, mean_iou
from mlorq.data.model_inputs import ImageInputs
from mlorq.data.source import ImageSettings
from mlorq.errors import DataError, one_line
from mlorq.models.batches import move_batch
from mlorq.models.detector import spread_points
from mlorq.models.segmentation import pixel_classes

SUFFIX = ".png"
IGNORED = -1  # of class numbers that do not count
NMSE_SAMPLES = 128
GREY = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes with one whole number per pixel
SCALED = {2: 85, 4: 17}  # Pillow multiplies grey values of PNG files with 2 and 4 bits, so that white is 255


@dataclass(frozen=True)
class LabelMaps:
    """The label maps of images, in the order of the images.

    Attributes:
        names: files, for errors.
        data: the encoded bytes.
        ignored: value of pixels that do not count.
        reduced: whether class 0 does not count either, and the others are one lower in the model.
    """

    names: Sequence[str]
    data: Sequence[bytes]
    ignored: int
    reduced: bool

    def classes(self, index: int) -> np.ndarray:
        """The model's class numbers of a map's pixels, ``(height, width)`` int64, ``IGNORED`` where they do not count.

        Raises:
            DataError: the map is a colour image, or cannot be decoded.
        """
        values = class_numbers(self.data[index], self.names[index])
        counts = values != self.ignored
        if self.reduced:
            counts &= values != 0
            values = values - 1
        return np.where(counts, values, IGNORED)


def class_numbers(data: bytes, name: str, kind: str = "mask") -> np.ndarray:
    """The pixels of an encoded map of whole numbers, ``(height, width)`` int64.

    Args:
        data: the encoded bytes.
        name: its file, for errors.
        kind: what it is, for errors.

    Raises:
        DataError: it is a colour image, or cannot be decoded.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(data)) as opened:
            mode = opened.mode
            if mode in GREY:
                values = np.array(opened).astype(np.int64)
    except Exception as error:  # decoders raise anything for damaged files
        raise DataError(f"{kind} {name} cannot be decoded: {one_line(error) or type(error).__name__}") from error
    if mode not in GREY:
        stored = "class numbers as a grey or palette image" if kind == "mask" else "depths as a grey image"
        raise DataError(f"{kind} {name} has mode {mode}: store {stored}")
    bits, colour = (data[24], data[25]) if data.startswith(b"\x89PNG") else (8, 0)
    return values // SCALED.get(bits, 1) if colour == 0 else values


def read_label_maps(
    location: str, folder: str, images: Sequence[Image], paths: Sequence[str], ignored: int, inputs: ImageInputs
) -> LabelMaps:
    """The label maps of images, from a folder that has a PNG file of the same relative name for each.

    Args:
        location: the folder of label maps, local path or URL.
        folder: base of relative paths.
        images: the images.
        paths: names of the images relative to their folder.
        ignored: value of pixels that do not count.
        inputs: the model's preprocessing.

    Raises:
        DataError: the folder or a map does not exist, a map is a colour image, or has not the size of its image.
    """
    root = resolve_location(location, folder)
    fs, path = url_to_fs(root)
    if not fs.isdir(path):
        raise DataError(f"folder of masks {root} does not exist")
    names = [posixpath.splitext(each)[0] + SUFFIX for each in paths]

    def read(pair: tuple[str, str]) -> bytes:
        name, image = pair
        return contents(fs, posixpath.join(path, name), f"mask {name} of image {image}", f"is missing in {root}")

    with ThreadPoolExecutor(READERS) as pool:
        data = list(pool.map(read, zip(names, paths, strict=True)))
    reduced = any(inputs.described.get(key) for key in ("do_reduce_labels", "reduce_labels"))
    maps = LabelMaps(names, data, ignored, reduced)
    for index, image in enumerate(images):
        height, width = maps.classes(index).shape
        wide, high = image_size(image)
        if (wide, high) != (width, height):
            raise DataError(f"mask {names[index]} is {width} × {height}, but image {image.name} is {wide} × {high}")
    return maps


def image_size(image: Image) -> tuple[int, int]:
    """Width and height, from the header.

    Raises:
        DataError: it cannot be decoded.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(image.data)) as opened:
            return opened.size
    except Exception as error:
        raise DataError(f"image {image.name} cannot be decoded: {one_line(error) or type(error).__name__}") from error


def segmentation_dataset(
    images: Sequence[Image], maps: LabelMaps, settings: ImageSettings, inputs: ImageInputs
) -> Dataset:
    """Evaluation data of a model of segmentation, with the metric ``miou``.

    Args:
        images: the chosen images, in order.
        maps: their label maps.
        settings: with the batch size.
        inputs: the model's preprocessing.
    """
    assert inputs.prepare is not None
    spread = [images[index] for index in spread_points(len(images), min(len(images), NMSE_SAMPLES))]
    key = digest_json(
        {
            "images": [[image.identity, digest_bytes(image.data)] for image in images],
            "masks": [digest_bytes(data) for data in maps.data],
            "ignored": maps.ignored,
            "preprocessing": inputs.described,
            "batch_size": settings.batch_size,
            "metric": MIOU,
        }
    )
    found = [np.unique(maps.classes(index)) for index in range(len(images))]
    owners = np.repeat(np.arange(len(images)), [len(values) for values in found])
    values = np.concatenate(found)
    owners, values = owners[values != IGNORED], values[values != IGNORED]
    lower = " (its pixels less one, as the image processor reduces labels)" if maps.reduced else ""
    check = LabelCheck(values, lambda index: f"mask {maps.names[owners[index]]}{lower}")
    batches = PreparedBatches(spread, inputs.prepare, settings.batch_size)
    every = PreparedBatches(images, inputs.prepare, settings.batch_size, keep=False)
    evaluate = _MeanIoU(every, maps, settings.batch_size)
    return Dataset(batches, len(spread), key, MIOU, evaluate=evaluate, label_check=check)


@dataclass(frozen=True)
class _MeanIoU:
    """Mean IoU of the classes of all pixels that count."""

    batches: Sequence[Any]
    maps: LabelMaps
    size: int  # images per batch

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        confusion = np.zeros((0, 0), dtype=np.int64)
        for place, batch in enumerate(self.batches):
            with torch.no_grad():
                logits = module(**move_batch(batch, floating.device, floating.dtype)).logits
                confusion = confusion if len(confusion) else np.zeros((logits.shape[1],) * 2, dtype=np.int64)
                for index, row in enumerate(logits, place * self.size):
                    labels = self.maps.classes(index)
                    predicted = pixel_classes(row, labels.shape).cpu().numpy()
                    confusion += _counts(labels, predicted, len(confusion), self.maps.names[index])
        return {MIOU: mean_iou(confusion)}


def _counts(labels: np.ndarray, predicted: np.ndarray, classes: int, name: str) -> np.ndarray:
    """Numbers of pixels by label and prediction, ``(classes, classes)``."""
    counts = labels != IGNORED
    labels, predicted = labels[counts], predicted[counts]
    if len(labels) and (labels.max() >= classes or labels.min() < 0):
        worst = labels.max() if labels.max() >= classes else labels.min()
        raise DataError(f"mask {name}: label {worst} is out of range: the model has {classes} classes")
    pairs: np.ndarray = np.bincount(labels * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)
