"""f(x) of models that return maps (of classes, of depths), and the class of each pixel at the size of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.models.detector import Size, spread_points

VALUES = 2**16  # most numbers of f(x) per sample
PIXELS = 2**26  # numbers of a resized map at a time: 256 MB in float32


def map_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a model that gives every position a class: logits, ``(samples, classes · positions)``.

    If a map has more than ``VALUES`` logits, those of a lattice of its positions stand for all, evenly spaced in both
    directions. Neighbouring positions differ little, so that their mean squared error estimates that of the map.
    """
    maps: Tensor = module(**batch).logits  # (samples, classes, height, width)
    return on_lattice(maps, VALUES).flatten(1)


def depth_outputs(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a model of depth: the predicted depth, at a lattice as in ``map_logits``, ``(samples, positions)``."""
    depths: Tensor = module(**batch).predicted_depth  # (samples, height, width)
    return on_lattice(depths.unsqueeze(1), VALUES).flatten(1)


def on_lattice(maps: Tensor, values: int) -> Tensor:
    """Maps ``(samples, channels, height, width)`` at a lattice of positions, with at most ``values`` numbers each."""
    channels, height, width = maps.shape[1:]
    rows, columns = lattice(height, width, max(1, values // channels))
    if rows * columns == height * width:
        return maps
    down = torch.tensor(spread_points(height, rows), device=maps.device)
    across = torch.tensor(spread_points(width, columns), device=maps.device)
    return maps[:, :, down][..., across]


def lattice(height: int, width: int, positions: int) -> Size:
    """Rows and columns of the largest lattice of a map's shape with at most ``positions`` points."""
    if height * width <= positions:
        return height, width
    scale = (positions / (height * width)) ** 0.5
    rows = min(max(1, int(height * scale)), positions)
    return rows, min(width, positions // rows)


def pixel_classes(logits: Tensor, size: Size) -> Tensor:
    """The class of every pixel, ``size`` int64: the largest of the logits after bilinear resizing.

    As ``post_process_semantic_segmentation`` of transformers, a part of the classes at a time: all of them would take
    gigabytes for large images.

    Args:
        logits: ``(classes, height, width)`` of one image.
        size: height and width of the result.
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.int64, device=logits.device)
    step = max(1, PIXELS // (size[0] * size[1]))
    for start in range(0, len(logits), step):
        part = logits[None, start : start + step].float()
        value, index = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0].max(0)
        better = value > best
        best = torch.where(better, value, best)
        found = torch.where(better, index + start, found)
    return found
