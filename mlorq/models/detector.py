"""The interface between the COCO source and the detection models of all libraries.

A detector converts images to a batch, and the outputs of a module to boxes, scores, labels and masks in pixels of the
original images. This is the full inference (with non-maximum suppression and thresholds), on which average precision
is measured. The search does not use it: it needs f(x), a differentiable tensor of fixed width
(``FloatModel.forward``), on the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.batches import Batch

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Detections:
    """The objects detected in one image, in any order.

    Attributes:
        boxes: ``(n, 4)``: left, top, right, bottom in pixels of the original image.
        scores: ``(n,)``.
        labels: ``(n,)`` int64, class indices of the model.
        masks: ``(n, height, width)`` bool; None for models without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Detector:
    """Preprocessing and inference of a detection model.

    Attributes:
        prepare: converts RGB images (PIL) to one batch: resized, normalised, and padded at the right and bottom to one
            size.
        detect: ``detect(module, batch, original sizes)`` returns one ``Detections`` per image.
        categories: converts ``{category id: name}`` of annotations to ``{label: category id}``; raises DataError if
            they do not match the model's classes.
        described: all settings of ``prepare`` as JSON values; part of the key of the data.
        masks: whether the model predicts masks.
    """

    prepare: Callable[[Sequence[Any]], Batch]
    detect: Callable[[nn.Module, Batch, Sequence[Size]], list[Detections]]
    categories: Callable[[Mapping[int, str]], dict[int, int]]
    described: dict[str, Any]
    masks: bool


def side_by_side(kinds: Sequence[Tensor]) -> Tensor:
    """Several kinds of outputs concatenated to one f(x), ``(samples, outputs)`` float32, each divided by √entries.

    With the division by the square root of its number of entries per sample, ``‖f(x)‖²`` is the sum of the mean squares
    of the kinds, and the most numerous kind (mask logits) does not dominate the NMSE (METHOD 3).

    Args:
        kinds: tensors with samples on the leading axis.
    """
    rows = [kind.flatten(1).float() for kind in kinds]
    return torch.cat([row / max(1, row.shape[1]) ** 0.5 for row in rows], dim=1)


def spread_points(length: int, points: int) -> list[int]:
    """The ``points`` indices below ``length`` at the centres of equal parts; repeated if ``length < points``."""
    return [int((index + 0.5) * length / points) for index in range(points)]


def at_points(maps: Tensor, sizes: Sequence[Size], points: int) -> Tensor:
    """Values of a map at a ``points × points`` lattice over the unpadded part of each sample.

    Args:
        maps: ``(samples, channels, height, width)``.
        sizes: height and width of the unpadded part in cells of the map, one pair per sample.
        points: number of lattice points per side.

    Returns:
        ``(samples, channels, points, points)``, whatever the size of the map.
    """
    found = []
    for row, (height, width) in zip(maps, sizes, strict=True):
        down = torch.tensor(spread_points(height, points), device=maps.device)
        across = torch.tensor(spread_points(width, points), device=maps.device)
        found.append(row[:, down][:, :, across])
    return torch.stack(found)
