"""Batches of encoded images, decoded once on first use; used by all sources of images for classifiers and encoders.

For models of timm, worker threads decode a batch (decoding and resampling release Python's global lock) and start on
the next one at once, so that it is ready when the model needs it. The cropped pixels are kept at one byte per value;
scaling and normalisation are repeated at every use, which costs little beside a forward pass and saves three quarters
of the memory.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlorq.artifacts.hashing import digest_bytes, digest_json
from mlorq.data.base import Dataset, LabelCheck, Predicted
from mlorq.data.metrics import DEPTH_ERROR, FEATURES, MIOU, NEIGHBOURS, top_k_accuracy
from mlorq.data.model_inputs import ImageInputs, image_inputs
from mlorq.data.pixels import decoded
from mlorq.data.source import ImageSettings, ModelSettings, Role
from mlorq.errors import DataError, one_line
from mlorq.models.tasks import InputKind


@dataclass(frozen=True)
class Image:
    """One encoded image.

    Attributes:
        name: file or row, for errors.
        data: the encoded bytes.
        label: its class number; None without a label.
        where: file and row of its label, for errors.
        identity: part of its name that enters the data set's key; None: only the contents do.
    """

    name: str
    data: bytes
    label: int | None
    where: str
    identity: str | None = None


def check_images(
    settings: ImageSettings, model: ModelSettings, folder: str, source: str, kinds: Sequence[InputKind] = ("images",)
) -> ImageInputs:
    """The model's image preprocessing, after checking that model and metric fit images.

    Raises:
        DataError: the model does not take images, or the metric does not fit its outputs.
        ModelError: its image processor cannot be loaded.
    """
    inputs = image_inputs(model, folder, source, kinds)
    if inputs.maps:
        fitting, kind = [MIOU], "maps of classes"
    elif inputs.depths:
        fitting, kind = [DEPTH_ERROR], "depths"
    else:
        fitting, kind = [*FEATURES], "features"
        if not inputs.features:
            fitting, kind = ["accuracy", *FEATURES], "image labels"
    if settings.metric not in (None, *fitting):
        raise DataError(f"metric {settings.metric!r} does not fit {kind}; choose {' or '.join(fitting)}")
    return inputs


def image_dataset(images: Sequence[Image], settings: ImageSettings, role: Role, inputs: ImageInputs) -> Dataset:
    """A data set of batches ``(samples, channels, height, width)``, preprocessed for the model.

    Args:
        images: the chosen images, in order.
        settings: with the batch size.
        role: calibration or evaluation; the latter has metrics.
        inputs: the model's preprocessing. The labels of images are not those of maps, and are left out then.

    Raises:
        DataError: maps have a metric, but there is nothing to compare them with.
    """
    if inputs.maps or inputs.depths:
        if settings.metric is not None and role == "evaluation":
            needed = "label maps: source image_folder with masks" if inputs.maps else "source image_folder with depths"
            raise DataError(f"metric {settings.metric} needs {needed}")
        images = [replace(image, label=None) for image in images]
    named = [
        [*([] if image.identity is None else [image.identity]), digest_bytes(image.data), image.label]
        for image in images
    ]
    of_features = settings.metric if settings.metric in FEATURES else NEIGHBOURS if inputs.features else None
    key = digest_json(
        {"images": named, "preprocessing": inputs.described, "batch_size": settings.batch_size}
        | ({"metric": of_features} if of_features and role == "evaluation" else {})
    )
    batches: Sequence[Any]
    if inputs.prepare is None:
        batches = ImageBatches(images, inputs.described, settings.batch_size)
    else:
        batches = PreparedBatches(images, inputs.prepare, settings.batch_size)
    labels = [image.label for image in images if image.label is not None]
    if len(labels) < len(images):
        return Dataset(batches, len(images), key)
    values = np.array(labels)
    if of_features is not None:
        metric = _Features(of_features, values) if role == "evaluation" else None
        return Dataset(batches, len(images), key, of_features if metric else None, metric)
    check = LabelCheck(values, lambda index: images[index].where)
    if role == "evaluation":
        return Dataset(batches, len(images), key, "accuracy", Accuracy(values), label_check=check)
    known = list(torch.split(torch.from_numpy(values), settings.batch_size))
    return Dataset(batches, len(images), key, labels=known, label_check=check)


class EncodedBatches(Sequence[Any], ABC):
    """Batches made from encoded images when they are asked for.

    Args:
        images: the images of all batches.
        size: images per batch.
    """

    def __init__(self, images: Sequence[Image], size: int) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._batch(range(len(self))[index])

    def _part(self, place: int) -> Sequence[Image]:
        return self._images[place * self._size : (place + 1) * self._size]

    @abstractmethod
    def _batch(self, place: int) -> Any:
        """The batch at a place from 0 on."""


class ImageBatches(EncodedBatches):
    """Batches that are decoded on first use, each together with the next one.

    Args:
        images: the images of all batches.
        described: timm's preprocessing.
        size: images per batch.
        workers: number of decoding threads; default: one per core.
    """

    def __init__(
        self, images: Sequence[Image], described: dict[str, Any], size: int, workers: int | None = None
    ) -> None:
        super().__init__(images, size)
        self._described = described
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._workers = workers or cores or 1
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[int, list[Future[Tensor]]] = {}
        self._kept: dict[int, Tensor] = {}

    def _batch(self, place: int) -> Tensor:
        return self._normalised(self._pixels(place))

    def _pixels(self, place: int) -> Tensor:
        """Cropped pixels of a batch, ``(samples, channels, height, width)`` uint8."""
        with self._lock:
            if place in self._kept:
                return self._kept[place]
            futures = self._begin(place)
            if place + 1 < len(self):
                self._begin(place + 1)
        try:
            found = torch.stack([future.result() for future in futures])
        except DataError:
            with self._lock:
                self._begun.pop(place, None)
            raise
        with self._lock:
            self._kept[place] = found
            self._begun.pop(place, None)
            if len(self._kept) == len(self) and self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None
        return found

    def _begin(self, place: int) -> list[Future[Tensor]]:
        """Start decoding a batch, unless it is decoded already."""
        if place in self._kept:
            return []
        if place not in self._begun:
            if self._pool is None:
                self._transform, self._mode = decoder(self._described)
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="mlorq-decode")
            decoding = [self._pool.submit(decode, each, self._transform, self._mode) for each in self._part(place)]
            self._begun[place] = decoding
        return self._begun[place]

    def _normalised(self, pixels: Tensor) -> Tensor:
        if pixels.is_floating_point():
            return pixels
        return normalised(pixels, self._described["mean"], self._described["std"])


class PixelBatches(Sequence[Tensor]):
    """Batches of pixels in memory, scaled and normalised at every use.

    Args:
        pixels: batches ``(samples, channels, height, width)`` uint8.
        mean, std: per channel, for pixels between 0 and 1.
    """

    def __init__(self, pixels: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> None:
        self._pixels, self._mean, self._std = pixels, mean, std

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return normalised(self._pixels[index], self._mean, self._std)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(pixels / 255 - mean) / std`` per channel, float32; ``pixels`` are ``(…, channels, height, width)`` uint8."""
    means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))
    # Same operations and order as torchvision's ToTensor and Normalize.
    return pixels.to(torch.float32).div_(255).sub_(means).div_(stds)


class PreparedBatches(EncodedBatches):
    """Batches that an image processor prepares on first use.

    Args:
        images: the images of all batches.
        prepare: makes a batch from images of Pillow.
        size: images per batch.
        keep: whether batches are kept; else they are prepared at every use.
    """

    def __init__(
        self, images: Sequence[Image], prepare: Callable[[Sequence[Any]], Any], size: int, *, keep: bool = True
    ) -> None:
        super().__init__(images, size)
        self._prepare, self._keep = prepare, keep
        self._kept: dict[int, Any] = {}

    def _batch(self, place: int) -> Any:
        if place in self._kept:
            return self._kept[place]
        batch = self._prepare([decoded(image.data, image.name, "RGB") for image in self._part(place)])
        if self._keep:
            self._kept[place] = batch
        return batch


def decoder(described: dict[str, Any]) -> tuple[Callable[[Any], Any], str]:
    """timm's evaluation transform without normalisation, and the mode of its images (``RGB`` or ``L``)."""
    from timm.data.transforms_factory import create_transform

    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    known = {name: described[name] for name in names if name in described}
    transform = create_transform(**known, is_training=False, normalize=False)
    return transform, "L" if described["input_size"][0] == 1 else "RGB"


def decode(image: Image, transform: Callable[[Any], Any], mode: str) -> Tensor:
    """The pixels of an image, ``(channels, height, width)`` uint8.

    Raises:
        DataError: the image, which is named, cannot be decoded.
    """
    pixels = decoded(image.data, image.name, mode)
    try:
        result: Tensor = transform(pixels)
    except (OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise DataError(f"image {image.name} cannot be resized: {one_line(error)}") from error
    return result


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of logits, and the share of samples whose class is among the five largest; of images and recordings.

    Attributes:
        labels: ``(samples,)`` class numbers.
    """

    labels: np.ndarray

    def _logits(self, outputs: Tensor) -> np.ndarray:
        logits = outputs.numpy()
        bad = self.labels[(self.labels < 0) | (self.labels >= logits.shape[1])]
        if len(bad):
            raise DataError(f"label {bad[0]} is out of range: the model has {logits.shape[1]} classes")
        return logits

    def predictions(self, outputs: Tensor) -> Predicted:
        """The classes with the largest logits."""
        return Predicted("classes", self._logits(outputs).argmax(1), self.labels)

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        """The metrics of logits ``(samples, classes)``.

        Raises:
            DataError: a label is out of range.
        """
        logits = self._logits(outputs)
        return {"accuracy": top_k_accuracy(logits, self.labels, 1), "top5": top_k_accuracy(logits, self.labels, 5)}


@dataclass(frozen=True)
class _Features:
    """A metric of features and the classes of their images."""

    name: str
    labels: np.ndarray

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        return {self.name: FEATURES[self.name](outputs.flatten(1).numpy(), self.labels)}
