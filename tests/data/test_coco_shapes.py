"""Shapes of annotations are those of their images, or refused before pycocotools reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlorq.data.coco_shapes import check_object, check_outline
from mlorq.errors import DataError

mask = pytest.importorskip("pycocotools.mask")
HEIGHT, WIDTH = 37, 51
GOOD = {"bbox": [1, 2.5, 3, 4], "area": 12, "segmentation": [[1, 1, 5, 1, 5, 5]]}


def encoded(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    share = generator.choice([0.0, 0.01, 0.5, 1.0])
    found = mask.encode(np.asfortranarray(generator.random((HEIGHT, WIDTH)) < share, dtype=np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode("ascii")}


def test_run_lengths_that_pycocotools_writes_are_taken() -> None:
    for seed in range(50):
        shape = encoded(seed)
        check_outline(shape, HEIGHT, WIDTH, "x")
        for cut in (shape["counts"][:-1], shape["counts"] + "1"):
            with pytest.raises(DataError, match="x: the run lengths"):
                check_outline(shape | {"counts": cut}, HEIGHT, WIDTH, "x")
        with pytest.raises(DataError, match="run lengths"):
            check_outline(shape, WIDTH, HEIGHT, "x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"bbox": None},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, float("nan")]},
        {"bbox": [1, 2, -3, 4]},
        {"bbox": [1, 2, 10**9, 4]},
        {"bbox": "1234"},
        {"area": "x"},
        {"area": -1},
        {"area": float("inf")},
        {"iscrowd": 2},
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
        {"segmentation": [[1, 2, 3, 4, 5, 10**400]]},
        {"segmentation": [[1, 2, 3, 4, 5, 1e9]]},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1, 2, 3]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]}},
        {"segmentation": {"size": [HEIGHT, WIDTH]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\U0001f600"}},
    ],
)
def test_objects_at_fault(wrong: dict[str, Any]) -> None:
    check_object(GOOD, HEIGHT, WIDTH, "annotation 3", masks=True)
    with pytest.raises(DataError, match="annotation 3") as caught:
        check_object(GOOD | wrong, HEIGHT, WIDTH, "annotation 3", masks=True)
    assert "\n" not in str(caught.value)
