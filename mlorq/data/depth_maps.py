"""Images with depth maps: reading and checking the maps, and the mean relative error of a model's depths.

A depth map is a grey PNG image of 8 or 16 bits, or an array in NumPy's format; pixels without depth are 0 (or not
finite). As for label maps, f(x) of at most ``NMSE_SAMPLES`` images is kept, and the metric is of all of them.
"""

from __future__ import annotations

import inspect
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
from mlorq.data.base import Dataset
from mlorq.data.choose import READERS
from mlorq.data.contents import contents
from mlorq.data.images import Image, PreparedBatches
from mlorq.data.label_maps import NMSE_SAMPLES, class_numbers, image_size
from mlorq.data.metrics import DEPTH_ERROR, depth_error
from mlorq.data.model_inputs import ImageInputs
from mlorq.data.source import ImageSettings
from mlorq.errors import DataError, one_line
from mlorq.models.batches import move_batch
from mlorq.models.detector import spread_points

SUFFIXES = (".png", ".npy")


@dataclass(frozen=True)
class DepthMaps:
    """The depth maps of images, in the order of the images.

    Attributes:
        names: files, for errors.
        data: the encoded bytes.
        scale: value per unit of depth.
    """

    names: Sequence[str]
    data: Sequence[bytes]
    scale: float

    def depths(self, index: int) -> np.ndarray:
        """The depths of a map's pixels, ``(height, width)`` float64; 0 where there is none.

        Raises:
            DataError: the map cannot be decoded, is a colour image or no matrix of numbers, or has no pixel with a
                depth.
        """
        name = self.names[index]
        if name.endswith(".npy"):
            values = _array(self.data[index], name)
        else:
            values = class_numbers(self.data[index], name, "depth map").astype(np.float64)
        values = np.where(np.isfinite(values) & (values > 0), values, 0.0) / self.scale
        if not values.any():
            raise DataError(f"depth map {name} has no pixel with a depth above 0")
        return values


def _array(data: bytes, name: str) -> np.ndarray:
    try:
        values: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # damaged headers raise errors of many types
        raise DataError(f"depth map {name} cannot be read: {one_line(error) or type(error).__name__}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "iuf":
        raise DataError(f"depth map {name} is no matrix of numbers, (height, width)")
    return values.astype(np.float64)


def read_depth_maps(
    location: str, folder: str, images: Sequence[Image], paths: Sequence[str], scale: float
) -> DepthMaps:
    """The depth maps of images, from a folder that has a PNG or NPY file of the same relative name for each.

    Args:
        location: the folder of depth maps, local path or URL.
        folder: base of relative paths.
        images: the images.
        paths: names of the images relative to their folder.
        scale: value per unit of depth.

    Raises:
        DataError: the folder or a map does not exist, or a map is at fault or has not the size of its image.
    """
    root = resolve_location(location, folder)
    fs, path = url_to_fs(root)
    if not fs.isdir(path):
        raise DataError(f"folder of depth maps {root} does not exist")

    def read(image: str) -> tuple[str, bytes]:
        names = [posixpath.splitext(image)[0] + suffix for suffix in SUFFIXES]
        for name in names:
            if fs.isfile(posixpath.join(path, name)):
                return name, contents(fs, posixpath.join(path, name), f"depth map {name}")
        raise DataError(f"depth map {' or '.join(names)} of image {image} is missing in {root}")

    with ThreadPoolExecutor(READERS) as pool:
        read_maps = list(pool.map(read, paths))
    maps = DepthMaps([name for name, _ in read_maps], [data for _, data in read_maps], scale)
    for index, image in enumerate(images):
        height, width = maps.depths(index).shape
        wide, high = image_size(image)
        if (wide, high) != (width, height):
            raise DataError(
                f"depth map {maps.names[index]} is {width} × {height}, but image {image.name} is {wide} × {high}"
            )
    return maps


def depth_dataset(
    images: Sequence[Image], maps: DepthMaps, settings: ImageSettings, align: str | None, inputs: ImageInputs
) -> Dataset:
    """Evaluation data of a model of depth, with the metric ``depth_error``.

    Args:
        images: the chosen images, in order.
        maps: their depth maps.
        settings: with the batch size.
        align: alignment of the predictions, as in ``mlorq.data.metrics.depth_error``.
        inputs: the model's preprocessing.
    """
    assert inputs.prepare is not None
    spread = [images[index] for index in spread_points(len(images), min(len(images), NMSE_SAMPLES))]
    key = digest_json(
        {
            "images": [[image.identity, digest_bytes(image.data)] for image in images],
            "depths": [digest_bytes(data) for data in maps.data],
            "scale": maps.scale,
            "align": align,
            "preprocessing": inputs.described,
            "batch_size": settings.batch_size,
            "metric": DEPTH_ERROR,
        }
    )
    batches = PreparedBatches(spread, inputs.prepare, settings.batch_size)
    every = PreparedBatches(images, inputs.prepare, settings.batch_size, keep=False)
    evaluate = _DepthError(every, maps, settings.batch_size, align, inputs.processor)
    return Dataset(batches, len(spread), key, DEPTH_ERROR, evaluate=evaluate)


@dataclass(frozen=True)
class _DepthError:
    """Mean over the images of the relative error of their pixels that have a depth."""

    batches: Sequence[Any]
    maps: DepthMaps
    size: int  # images per batch
    align: str | None
    processor: Any

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        errors = []
        for place, batch in enumerate(self.batches):
            first = place * self.size
            true = [self.maps.depths(index) for index in range(first, first + len(batch["pixel_values"]))]
            with torch.no_grad():
                outputs = module(**move_batch(batch, floating.device, floating.dtype))
                found = self._resized(outputs, [depths.shape for depths in true])
            for predicted, depths in zip(found, true, strict=True):
                counts = depths > 0
                errors.append(depth_error(predicted[counts], depths[counts], self.align))
        return {DEPTH_ERROR: float(np.mean(errors))}

    def _resized(self, outputs: Any, sizes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The predicted depths at the size of the images, as the image processor resizes them."""
        resize = self.processor.post_process_depth_estimation
        options = {"target_sizes": sizes}
        if "source_sizes" in inspect.signature(resize).parameters:  # of ZoeDepth, which pads images
            options["source_sizes"] = sizes
        rows = resize(outputs, **options)
        return [
            row["predicted_depth"].float().cpu().numpy().reshape(size) for row, size in zip(rows, sizes, strict=True)
        ]
