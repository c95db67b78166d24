"""Images with COCO instance annotations, for detectors: batches for f(x), and average precision of the full detector.

The images of a batch are resized one by one and padded to one size; images are sorted by aspect ratio, so that batches
need little padding. Calibration ignores the labels. Evaluation runs the whole detector, including non-maximum
suppression, on every image; the output NMSE is measured on about ``NMSE_SAMPLES`` of them, because f(x) of thousands of
images would take gigabytes.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from fsspec.core import url_to_fs
from torch import nn

from mlorq.artifacts.hashing import digest_bytes, digest_json
from mlorq.artifacts.locations import resolve_location
from mlorq.data.average_precision import average_precisions, result_rows
from mlorq.data.base import Dataset
from mlorq.data.choose import READERS, read_image, seeded_choice
from mlorq.data.coco import CocoSettings
from mlorq.data.metrics import DETECTION
from mlorq.data.packages import PYCOCOTOOLS
from mlorq.data.pixels import decoded
from mlorq.data.source import ModelSettings, Role
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.detector import Detector

NMSE_SAMPLES = 128  # rounded down to whole batches, at least one


@dataclass(frozen=True)
class _Image:
    id: int
    path: str  # relative to the root
    height: int
    width: int
    data: bytes = field(default=b"", repr=False)


def coco_dataset(
    settings: CocoSettings, detector: Detector, role: Role, model: ModelSettings, folder: str, seed: int
) -> Dataset:
    """A data set of batches for a detector; evaluation data has box AP and mask AP.

    Args:
        settings: keys of the source.
        detector: preprocessing and postprocessing of the model.
        role: calibration or evaluation.
        model: the ``model`` section, whose task is part of the key.
        folder: base of relative paths.
        seed: of the choice of samples.

    Raises:
        DataError: the annotations or an image are missing or malformed, the categories or the metric do not fit the
            model, or pycocotools is not installed.
    """
    assert settings.root is not None
    assert settings.annotations is not None
    metric = settings.metric or DETECTION[detector.masks]
    if metric not in DETECTION or (metric == "mask_ap" and not detector.masks):
        wanted = " or ".join(DETECTION[: 1 + detector.masks])
        raise DataError(f"metric {metric!r} does not fit the model's detections; choose {wanted}")
    location = resolve_location(settings.annotations, folder)
    truth = read_annotations(location)
    images = _choose([_image(row, location) for row in truth["images"]], settings.samples, seed, location)
    root = resolve_location(settings.root, folder)
    fs, path = url_to_fs(root)
    if not fs.isdir(path):
        raise DataError(f"image folder {root} does not exist")
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(lambda image: read_image(fs, posixpath.join(path, image.path)), images))
    images = [
        _Image(image.id, image.path, image.height, image.width, data)
        for image, data in zip(images, contents, strict=True)
    ]
    described: dict[str, Any] = {
        "images": [[posixpath.basename(image.path), digest_bytes(image.data)] for image in images],
        "preprocessing": detector.described,
        "task": getattr(model.own, "task", None),
        "batch_size": settings.batch_size,
    }
    batches = _LazyBatches(images, detector, settings.batch_size, keep=role == "calibration")
    if role == "calibration":
        return Dataset(batches, len(images), digest_json(described))
    PYCOCOTOOLS.require("the metric of source coco")
    for number, row in enumerate(truth["annotations"], 1):
        for key in ("bbox", "area", *(["segmentation"] if detector.masks else [])):
            if row.get(key) is None:
                raise DataError(f"annotations {location}: annotation {row.get('id', f'number {number}')} lacks {key!r}")
    names = {category["id"]: category["name"] for category in truth["categories"]}
    categories = detector.categories(names)
    chosen = {image.id for image in images}
    described["truth"] = digest_json(
        {
            "images": [image.id for image in images],
            "annotations": [row for row in truth["annotations"] if row["image_id"] in chosen],
            "categories": sorted((label, category) for label, category in categories.items()),
        }
    )
    described["metric"] = metric
    spread = batches.spread(min(len(batches), max(1, NMSE_SAMPLES // settings.batch_size)))
    evaluate = _Evaluation(batches, detector, truth, categories)
    return Dataset(spread, spread.samples, digest_json(described), metric, evaluate=evaluate)


@dataclass(frozen=True)
class _Evaluation:
    """Average precision of a module's detections in all images."""

    batches: _LazyBatches
    detector: Detector
    truth: Mapping[str, Any]
    categories: Mapping[int, int]

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        rows: list[dict[str, Any]] = []
        for index, batch in enumerate(self.batches):
            images = self.batches.images_of(index)
            with torch.no_grad():
                moved = move_batch(batch, floating.device, floating.dtype)
                found = self.detector.detect(module, moved, [(image.height, image.width) for image in images])
            for image, detections in zip(images, found, strict=True):
                rows += result_rows(image.id, detections, self.categories)
        chosen = [image.id for image in self.batches.images]
        return average_precisions(self.truth, rows, chosen, masks=self.detector.masks)


class _LazyBatches(Sequence[Any]):
    """Batches decoded and preprocessed on access; kept afterwards if ``keep``, for data that is used many times."""

    def __init__(self, images: Sequence[_Image], detector: Detector, size: int, *, keep: bool = False) -> None:
        # By aspect ratio, landscapes first, then by id.
        self.images = sorted(images, key=lambda image: (image.height / image.width, image.id))
        self._detector, self._size, self._keep = detector, size, keep
        self._kept: dict[int, Any] = {}

    @property
    def samples(self) -> int:
        """Number of images in all batches."""
        return len(self.images)

    def spread(self, batches: int) -> _LazyBatches:
        """``batches`` of the batches, evenly spaced."""
        picked = [int((index + 0.5) * len(self) / batches) for index in range(batches)]
        return _LazyBatches([image for index in picked for image in self.images_of(index)], self._detector, self._size)

    def images_of(self, index: int) -> Sequence[_Image]:
        """The images of one batch."""
        return self.images[index * self._size : (index + 1) * self._size]

    def __len__(self) -> int:
        return -(-len(self.images) // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        if place in self._kept:
            return self._kept[place]
        batch = self._detector.prepare([_decode(image) for image in self.images_of(place)])
        if self._keep:
            self._kept[place] = batch
        return batch


def read_annotations(location: str) -> dict[str, Any]:
    """The contents of a file of COCO instances, with references to images and categories checked.

    Raises:
        DataError: the file is missing, is not JSON, lacks a list, or refers to an image or category that it does not
            list.
    """
    fs, path = url_to_fs(location)
    try:
        truth: dict[str, Any] = json.loads(fs.cat_file(path))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"annotations {location} do not exist") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"annotations {location} are not JSON: {error}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(truth, dict) or not isinstance(truth.get(part), list):
            raise DataError(f"annotations {location} have no list {part!r}")
    try:
        images = _ids(truth["images"], "image", location)
        categories = _ids(truth["categories"], "category", location)
        for row in truth["categories"]:
            row["name"]  # detectors match classes by name
        for number, row in enumerate(truth["annotations"], 1):
            where = f"annotations {location}: annotation {row.get('id', f'number {number}')}"
            if row["category_id"] not in categories:
                raise DataError(f"{where} has category {row['category_id']}, which is not listed")
            if row["image_id"] not in images:
                raise DataError(f"{where} has image {row['image_id']}, which is not listed")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"annotations {location}: an entry lacks {error}") from error
    return truth


def _ids(rows: Sequence[Mapping[str, Any]], kind: str, location: str) -> set[int]:
    """The ids of images or categories: different integers, because results refer to them."""
    found: set[int] = set()
    for row in rows:
        if not isinstance(row["id"], int) or row["id"] in found:
            problem = "occurs twice" if row["id"] in found else "is not an integer"
            raise DataError(f"annotations {location}: {kind} id {row['id']!r} {problem}")
        found.add(row["id"])
    return found


def _image(row: Mapping[str, Any], location: str) -> _Image:
    try:
        return _Image(int(row["id"]), str(row["file_name"]), int(row["height"]), int(row["width"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"annotations {location}: image {row.get('id')} is malformed: {error}") from error


def _choose(images: list[_Image], samples: int | None, seed: int, location: str) -> list[_Image]:
    """All images or a seeded choice of them, sorted by id."""
    images = sorted(images, key=lambda image: image.id)
    if not images:
        raise DataError(f"annotations {location} list no images")
    return [images[index] for index in seeded_choice(len(images), samples, seed, f"annotations {location}", " images")]


def _decode(image: _Image) -> Any:
    found = decoded(image.data, image.path, "RGB")
    if found.size != (image.width, image.height):
        width, height = found.size
        raise DataError(
            f"image {image.path} is {width} × {height}, but {image.width} × {image.height} in the annotations"
        )
    return found
