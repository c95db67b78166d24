"""Checks of boxes and outlines of COCO annotations.

pycocotools computes with them in C, after the search and without checks of its own: run lengths of another image would
make it write beyond its memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlorq.errors import DataError

BEYOND = 4  # sides of the image by which a corner may be outside of it


def check_object(row: Mapping[str, Any], height: int, width: int, where: str, *, masks: bool) -> None:
    """Check the box, the area and, for masks, the outline of an annotation.

    Args:
        row: the annotation.
        height, width: of its image.
        where: locates it in errors.
        masks: whether its outline is read.

    Raises:
        DataError: one is missing, or is not what COCO's format says.
    """
    for key in ("bbox", "area", *(["segmentation"] if masks else [])):
        if row.get(key) is None:
            raise DataError(f"{where} lacks {key!r}")
    box, area, crowd = row["bbox"], row["area"], row.get("iscrowd", 0)
    if not _numbers(box) or len(box) != 4 or not _inside(box, height, width) or min(box[2:]) < 0:
        raise DataError(f"{where}: its bbox {box!r:.60} is not [left, top, width, height] in its image")
    if not _is_number(area) or area < 0:
        raise DataError(f"{where}: its area {area!r:.60} is not a number of pixels")
    if crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd is {crowd!r:.60}, neither 0 nor 1")
    if masks:
        check_outline(row["segmentation"], height, width, where)


def check_outline(shape: Any, height: int, width: int, where: str) -> None:
    """Check a segmentation: polygons, or the run lengths of a mask.

    Args:
        shape: the segmentation.
        height, width: of its image.
        where: locates it in errors.

    Raises:
        DataError: it is something else, or that of another image.
    """
    if isinstance(shape, Mapping):
        lengths: Any = shape.get("counts")
        if isinstance(lengths, str):
            lengths = _decoded(lengths)
        pixels = height * width
        known = isinstance(lengths, list) and all(type(length) is int and 0 <= length <= pixels for length in lengths)
        if shape.get("size") == [height, width] and known and sum(lengths) == pixels:
            return
        raise DataError(f"{where}: the run lengths of its segmentation are not those of {width} × {height} pixels")
    polygons = isinstance(shape, list) and shape and all(_numbers(part) for part in shape)
    # pycocotools takes four numbers at the beginning for a box.
    if not polygons or len(shape[0]) < 6 or not all(_is_polygon(part, height, width) for part in shape):
        raise DataError(f"{where}: its segmentation is neither polygons in its image nor run lengths")


def _is_number(value: Any) -> bool:
    return abs(value) < 2**63 if type(value) is int else type(value) is float and math.isfinite(value)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_polygon(corners: Sequence[float], height: int, width: int) -> bool:
    return len(corners) >= 4 and len(corners) % 2 == 0 and _inside(corners, height, width)


def _inside(corners: Sequence[float], height: int, width: int) -> bool:
    """Whether horizontal and vertical coordinates, in turn, are in an image or close to it."""
    far = [max(map(abs, corners[first::2]), default=0) for first in (0, 1)]
    return far[0] <= (1 + BEYOND) * width and far[1] <= (1 + BEYOND) * height


def _decoded(text: str) -> list[int]:
    """The run lengths in COCO's text of them: digits of 5 bits, of differences to the length before the last.

    A text that is cut off has fewer pixels than the image.
    """
    found: list[int] = []
    value, shift = 0, 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64 or shift > 50:
            return []
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value, shift = 0, 0
    return found if shift == 0 else []
