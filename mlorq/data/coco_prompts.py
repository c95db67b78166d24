"""Images with boxes of COCO annotations as prompts, and the IoU of a model's masks with those of the annotations.

A sample of f(x) is an image with one box, that of its object of middle size. Evaluation prompts with up to ``PROMPTS``
boxes of every image, evenly spaced in the order of size, in one pass: an image is encoded once. Crowds are no objects,
and images without objects are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.locations import resolve_location
from mlorq.data.base import Dataset
from mlorq.data.coco import CocoSettings
from mlorq.data.coco_files import CocoBatches, CocoImage, decode, image_names, load_images, read_annotations
from mlorq.data.coco_images import NMSE_SAMPLES
from mlorq.data.coco_shapes import check_outline
from mlorq.data.metrics import MASK_IOU, iou
from mlorq.data.packages import PYCOCOTOOLS
from mlorq.data.source import Role
from mlorq.errors import DataError, one_line
from mlorq.models.batches import move_batch
from mlorq.models.detector import spread_points
from mlorq.models.mask_generation import Prompted

PROMPTS = 8  # of an image, in evaluation


@dataclass(frozen=True)
class _Object:
    box: tuple[float, float, float, float]  # left, top, right, bottom
    row: Mapping[str, Any]
    where: str


def prompt_dataset(settings: CocoSettings, inputs: Prompted, role: Role, folder: str, seed: int) -> Dataset:
    """A data set of images with boxes; evaluation data has the metric ``mask_iou``.

    Args:
        settings: keys of the source.
        inputs: the model's preparation and inference.
        role: calibration or evaluation.
        folder: base of relative paths.
        seed: of the choice of samples.

    Raises:
        DataError: the annotations or an image are missing or malformed, there are no objects, the metric is another
            one, or pycocotools is not installed.
    """
    if settings.metric not in (None, MASK_IOU):
        raise DataError(f"metric {settings.metric!r} does not fit masks of prompts; choose {MASK_IOU}")
    assert settings.annotations is not None
    location = resolve_location(settings.annotations, folder)
    truth = read_annotations(location)
    objects = _objects(truth["annotations"], f"annotations {location}")
    if not objects:
        raise DataError(f"annotations {location} have no objects, only images or crowds")
    images = load_images(truth, settings, location, folder, seed, set(objects))
    one, many = ({image.id: _spread(objects[image.id], count) for image in images} for count in (1, PROMPTS))

    def prepare(part: Sequence[CocoImage]) -> Any:
        return inputs.prepare([decode(image) for image in part], [[each.box for each in one[i.id]] for i in part])[0]

    batches = CocoBatches(images, prepare, settings.batch_size, keep=role == "calibration")
    used = one if role == "calibration" else many
    described: dict[str, Any] = {
        "images": image_names(images),
        "boxes": [[each.box for each in used[image.id]] for image in images],
        "preprocessing": inputs.described,
        "batch_size": settings.batch_size,
    }
    if role == "calibration":
        return Dataset(batches, len(images), digest_json(described))
    PYCOCOTOOLS.require(f"metric {MASK_IOU}")
    for image in images:
        for each in many[image.id]:
            if each.row.get("segmentation") is None:
                raise DataError(f"{each.where} lacks 'segmentation'")
            check_outline(each.row["segmentation"], image.height, image.width, each.where)
    described["truth"] = [[each.row["segmentation"] for each in many[image.id]] for image in images]
    described["metric"] = MASK_IOU
    spread = batches.spread(min(len(batches), max(1, NMSE_SAMPLES // settings.batch_size)))

    def prepare_all(part: Sequence[CocoImage]) -> Any:
        most = max(len(many[image.id]) for image in part)
        # Images of a batch have equally many boxes: the first one is repeated, and its repetitions are not counted.
        boxes = [[each.box for each in many[image.id]] for image in part]
        return inputs.prepare([decode(image) for image in part], [row + row[:1] * (most - len(row)) for row in boxes])

    every = CocoBatches(images, prepare_all, settings.batch_size)
    evaluate = _MaskIoU(every, many, inputs)
    return Dataset(spread, spread.samples, digest_json(described), MASK_IOU, evaluate=evaluate)


@dataclass(frozen=True)
class _MaskIoU:
    """Mean over all boxes of the IoU of a module's mask with the annotation's."""

    batches: CocoBatches
    objects: Mapping[int, Sequence[_Object]]
    inputs: Prompted

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        found: list[float] = []
        for place, (batch, sizes) in enumerate(self.batches):
            with torch.no_grad():
                moved = move_batch(batch, floating.device, floating.dtype)
                rows = self.inputs.masks(module, moved, sizes)
            for image, masks in zip(self.batches.images_of(place), rows, strict=True):
                for each, mask in zip(self.objects[image.id], masks.cpu().numpy(), strict=False):  # no repetitions
                    found.append(iou(mask, _truth(each, image)))
        return {MASK_IOU: float(np.mean(found))}


def _objects(rows: Sequence[Mapping[str, Any]], origin: str) -> dict[int, list[_Object]]:
    """The objects of each image that has any, from the largest to the smallest."""
    found: defaultdict[int, list[_Object]] = defaultdict(list)
    for number, row in enumerate(rows, 1):
        where = f"{origin}: annotation {row.get('id', f'number {number}')!s:.60}"
        if row.get("bbox") is None:
            raise DataError(f"{where} lacks 'bbox'")
        try:
            left, top, width, height = (float(value) for value in row["bbox"])
            if not math.isfinite(left + top + width + height):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{where}: its bbox {row['bbox']!r:.60} is not [left, top, width, height]") from None
        if not row.get("iscrowd") and width > 0 and height > 0:
            found[row["image_id"]].append(_Object((left, top, left + width, top + height), row, where))
    return {image: sorted(objects, key=_size, reverse=True) for image, objects in found.items()}


def _size(each: _Object) -> float:
    left, top, right, bottom = each.box
    return (right - left) * (bottom - top)


def _spread(objects: Sequence[_Object], count: int) -> list[_Object]:
    """``count`` objects, or all if there are fewer, evenly spaced in their order."""
    return [objects[index] for index in spread_points(len(objects), min(count, len(objects)))]


def _truth(each: _Object, image: CocoImage) -> np.ndarray:
    """The mask of an annotation, ``(height, width)`` bool: polygons, or run lengths."""
    from pycocotools import mask

    shape = each.row["segmentation"]
    try:
        if not isinstance(shape, dict) or isinstance(shape["counts"], list):
            shape = mask.frPyObjects(shape, image.height, image.width)
        found: np.ndarray = mask.decode(mask.merge(shape) if isinstance(shape, list) else shape)
    except Exception as error:  # compiled code raises anything for malformed polygons
        raise DataError(f"{each.where}: its segmentation cannot be read: {one_line(error)}") from error
    if found.shape != (image.height, image.width):
        raise DataError(f"{each.where}: its segmentation is {found.shape[1]} × {found.shape[0]}, unlike its image")
    return found.astype(bool)
