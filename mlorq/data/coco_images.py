"""Images with COCO instance annotations, for detectors: batches for f(x), and average precision of the full detector.

The images of a batch are resized one by one and padded to one size; images are sorted by aspect ratio, so that batches
need little padding. Calibration ignores the labels. Evaluation runs the whole detector, including non-maximum
suppression, on every image; the output NMSE is measured on about ``NMSE_SAMPLES`` of them, because f(x) of thousands of
images would take gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.locations import resolve_location
from mlorq.data.average_precision import average_precisions, result_rows
from mlorq.data.base import Dataset
from mlorq.data.coco import CocoSettings
from mlorq.data.coco_files import CocoBatches, CocoImage, decode, image_names, load_images, read_annotations
from mlorq.data.coco_shapes import check_object
from mlorq.data.metrics import DETECTION
from mlorq.data.packages import PYCOCOTOOLS
from mlorq.data.source import ModelSettings, Role
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.detector import Detector

NMSE_SAMPLES = 128  # rounded down to whole batches, at least one


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
    assert settings.annotations is not None
    metric = settings.metric or DETECTION[detector.masks]
    if metric not in DETECTION or (metric == "mask_ap" and not detector.masks):
        wanted = " or ".join(DETECTION[: 1 + detector.masks])
        raise DataError(f"metric {metric!r} does not fit the model's detections; choose {wanted}")
    location = resolve_location(settings.annotations, folder)
    truth = read_annotations(location)
    images = load_images(truth, settings, location, folder, seed)
    described: dict[str, Any] = {
        "images": image_names(images),
        "preprocessing": detector.described,
        "task": getattr(model.own, "task", None),
        "batch_size": settings.batch_size,
    }

    def prepare(part: Sequence[CocoImage]) -> Any:
        return detector.prepare([decode(image) for image in part])

    batches = CocoBatches(images, prepare, settings.batch_size, keep=role == "calibration")
    if role == "calibration":
        return Dataset(batches, len(images), digest_json(described))
    PYCOCOTOOLS.require("the metric of source coco")
    sizes = {image.id: (image.height, image.width) for image in images}
    for number, row in enumerate(truth["annotations"], 1):
        if row["image_id"] in sizes:
            where = f"annotations {location}: annotation {row.get('id', f'number {number}')!s:.60}"
            check_object(row, *sizes[row["image_id"]], where, masks=detector.masks)
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

    batches: CocoBatches
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
