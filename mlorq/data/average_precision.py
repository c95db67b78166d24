"""Average precision of boxes and masks, by pycocotools, the reference implementation of COCO's metrics."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mlorq.data.packages import PYCOCOTOOLS
from mlorq.errors import DataError, one_line
from mlorq.models.detector import Detections

KINDS = {"box": "bbox", "mask": "segm"}
# The first six numbers of pycocotools' summary: AP at IoU 0.5:0.95, 0.5 and 0.75, and by object size.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def result_rows(image: int, found: Detections, categories: Mapping[int, int]) -> list[dict[str, Any]]:
    """COCO result rows of the detections in one image; labels without a category are left out.

    Args:
        image: id of the image.
        found: detections in pixels of the image.
        categories: ``{label: category id}``.
    """
    rows = []
    masks = None if found.masks is None else found.masks.cpu().numpy()
    scores, labels = found.scores.tolist(), found.labels.tolist()
    for index, (box, score, label) in enumerate(zip(_sized(found.boxes), scores, labels, strict=True)):
        if label not in categories:
            continue
        row = {"image_id": image, "category_id": categories[label], "score": score, "bbox": box}
        if masks is not None:
            row["segmentation"] = _encoded(masks[index])
        rows.append(row)
    return rows


def average_precisions(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], images: Iterable[int], *, masks: bool
) -> dict[str, float]:
    """``box_ap``, ``box_ap50``, … and ``mask_ap``, … in [0, 1], without those of sizes that have no objects.

    Args:
        truth: COCO instances: ``images``, ``annotations``, ``categories``.
        results: COCO result rows, with ``bbox`` and, for masks, ``segmentation``.
        images: ids of the images to evaluate; rows of others are left out.
        masks: whether to compute the AP of masks too.

    Raises:
        DataError: pycocotools is not installed, or cannot read an annotation.
    """
    PYCOCOTOOLS.require("average precision")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    chosen = sorted(set(images))
    wanted = set(chosen)
    results = [row for row in results if row["image_id"] in wanted]
    found: dict[str, float] = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            known = COCO()
            known.dataset = _part(truth, chosen)
            known.createIndex()
            for name, kind in list(KINDS.items())[: 2 if masks else 1]:
                figures = np.zeros(len(FIGURES))
                if results:
                    # Without the box, so that areas of masks are computed from their pixels.
                    kept = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
                    rows = known.loadRes([{key: row[key] for key in kept} for row in results])
                    evaluation = COCOeval(known, rows, kind)
                    evaluation.params.imgIds = chosen
                    evaluation.evaluate()
                    evaluation.accumulate()
                    evaluation.summarize()
                    figures = evaluation.stats[: len(FIGURES)]
                found |= {f"{name}_{figure}": float(value) for figure, value in zip(FIGURES, figures, strict=True)}
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        text = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"pycocotools cannot read the annotations: {text}") from error
    return {name: value for name, value in found.items() if value >= 0}


def _part(truth: Mapping[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """The annotations of some images, copied because pycocotools modifies them.

    They are numbered from 1: pycocotools takes an object with the id 0 for none, and one of two with the same id away.
    """
    wanted = set(images)
    annotations = [row for row in truth["annotations"] if row["image_id"] in wanted]
    return {
        "info": {},
        "images": [dict(image) for image in truth["images"] if image["id"] in wanted],
        "annotations": [{"iscrowd": 0, **row, "id": number} for number, row in enumerate(annotations, 1)],
        "categories": [dict(category) for category in truth["categories"]],
    }


def _sized(boxes: Tensor) -> list[list[float]]:
    """Boxes as left, top, width and height, from corners ``(boxes, 4)``."""
    if not len(boxes):
        return []
    values = boxes.double().cpu()
    values[:, 2:] -= values[:, :2]
    found: list[list[float]] = values.tolist()
    return found


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as codes

    found: dict[str, Any] = codes.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode("ascii")}
