"""Average precision depends on the objects and not on how a file numbers them."""

from __future__ import annotations

import pytest

from mlorq.data.average_precision import average_precisions

pytest.importorskip("pycocotools")

# Three objects in two images; the second detection of image 1 is off by some pixels.
BOXES = [(1, [5.0, 5.0, 20.0, 20.0]), (1, [30.0, 2.0, 10.0, 30.0]), (2, [5.0, 5.0, 20.0, 20.0])]
FOUND = [(1, [5.0, 5.0, 20.0, 20.0]), (1, [32.0, 2.0, 10.0, 30.0]), (2, [5.0, 5.0, 20.0, 20.0])]


def box_ap(ids: list[int | None], **extra) -> float:
    rows = []
    for number, (image, box) in zip(ids, BOXES, strict=True):
        row = {"image_id": image, "category_id": 4, "bbox": box, "area": box[2] * box[3], **extra}
        rows.append(row if number is None else {"id": number, **row})
    truth = {
        "images": [{"id": image, "width": 50, "height": 40} for image in (1, 2)],
        "annotations": rows,
        "categories": [{"id": 4, "name": "thing"}],
    }
    results = [
        {"image_id": image, "category_id": 4, "bbox": box, "score": 0.9 - index / 10}
        for index, (image, box) in enumerate(FOUND)
    ]
    figures = average_precisions(truth, results, [1, 2], masks=False)
    assert [row.get("id") for row in rows] == ids, "the caller's annotations stay as they are"
    return figures["box_ap"]


@pytest.mark.parametrize("ids", [[0, 1, 2], [7, 7, 7], [5, 0, 5], [None, None, None], [10**12, -1, 3]])
def test_ids_of_annotations_do_not_matter(ids):
    usual = box_ap([1, 2, 3], iscrowd=0)
    assert 0.7 < usual < 0.8
    assert box_ap(ids, iscrowd=0) == box_ap(ids) == usual
