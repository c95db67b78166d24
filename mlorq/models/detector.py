"""What the COCO source asks of a model that detects objects, whichever library it is of.

A detector turns images into a batch, and a module's outputs into boxes, scores, labels and masks in the pixels of the
original images, with everything that belongs to its inference (non-maximum suppression, thresholds). That is what
average precision is measured on. The search never calls it: it needs f(x), a differentiable tensor of a fixed width
(``FloatModel.forward``), from the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import Batch

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first or in any order.

    Attributes:
        boxes: ``(n, 4)``: left, top, right, bottom in pixels of the original image.
        scores: ``(n,)``.
        labels: ``(n,)`` int64, the model's own class numbers.
        masks: ``(n, height, width)`` bool; None for models that give boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Detector:
    """How to run a model on images.

    Attributes:
        prepare: RGB images (PIL) to one batch: resized, normalised, and padded at the right and the bottom to one size.
        detect: a module, a batch and the images' original sizes to ``Detections``, one an image.
        categories: ``{category id: name}`` of annotations to ``{label: category id}``; a DataError where they do not
            belong together.
        described: all that ``prepare`` depends on, as JSON values: a part of the data's key.
        masks: whether there are masks.
    """

    prepare: Callable[[Sequence[Any]], Batch]
    detect: Callable[[nn.Module, Batch, Sequence[Size]], list[Detections]]
    categories: Callable[[Mapping[int, str]], dict[int, int]]
    described: dict[str, Any]
    masks: bool


def side_by_side(kinds: Sequence[Tensor]) -> Tensor:
    """Several kinds of outputs as one f(x), ``(samples, outputs)``: each kind weighs the same, however many there are.

    A kind is divided by the square root of its number of entries, so that ``‖f(x)‖²`` is the sum of the kinds' mean
    squares, and the NMSE is not that of the most numerous kind (mask logits) alone.

    Args:
        kinds: tensors whose leading axis is that of the samples.
    """
    rows = [kind.flatten(1).float() for kind in kinds]
    return torch.cat([row / max(1, row.shape[1]) ** 0.5 for row in rows], dim=1)


def spread_points(length: int, points: int) -> list[int]:
    """``points`` indices below ``length``, in the middles of equal parts; repeated where these are too small."""
    return [int((index + 0.5) * length / points) for index in range(points)]


def at_points(maps: Tensor, sizes: Sequence[Size], points: int) -> Tensor:
    """A map's values at a ``points × points`` lattice over the part of each sample that is no padding.

    Args:
        maps: ``(samples, channels, height, width)``.
        sizes: of that part, in cells of the map, a pair a sample.
        points: of the lattice, a side.

    Returns:
        ``(samples, channels, points, points)``: of a fixed width, whatever the size of the map.
    """
    found = []
    for row, (height, width) in zip(maps, sizes, strict=True):
        down = torch.tensor(spread_points(height, points), device=maps.device)
        across = torch.tensor(spread_points(width, points), device=maps.device)
        found.append(row[:, down][:, :, across])
    return torch.stack(found)
