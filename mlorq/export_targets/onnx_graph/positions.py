"""Position embeddings resized to the shape of each image, as products, for exporters.

SigLIP 2 reads images of any aspect as rows of patches, and resizes its square of embeddings for one image after
another to a height and width that are values of an input: a loop that no graph can hold. Antialiased bilinear resizing
is linear and separable, so that the same embeddings are a product with weights of rows and of columns, for all images
at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

METHOD = "resize_positional_embeddings"  # of transformers' classes: (embeddings, shapes, max_length)


def resized(embeddings: Tensor, shapes: Tensor, max_length: int) -> Tensor:
    """Embeddings of the patches of images, row by row; those behind an image are that of its first patch.

    Args:
        embeddings: ``(rows, columns, width)``.
        shapes: rows and columns of patches of each image, ``(samples, 2)`` integers.
        max_length: patches of a sample, at least rows times columns.

    Returns:
        ``(samples, max_length, width)``, as ``F.interpolate(mode="bilinear", antialias=True)`` makes them; but torch
        2.13 gives all rows of an image of a single column the values of the first.
    """
    rows, columns, width = embeddings.shape
    heights, widths = shapes[:, :1], shapes[:, 1:]
    patch = torch.arange(max_length, device=shapes.device).unsqueeze(0)
    patch = torch.where(patch < heights * widths, patch, torch.zeros_like(patch))
    row = torch.div(patch, widths, rounding_mode="floor")
    down = _weights(row, heights, rows)
    across = _weights(patch - row * widths, widths, columns)
    both = (down.unsqueeze(3) * across.unsqueeze(2)).flatten(2)
    return (both @ embeddings.float().reshape(rows * columns, width)).to(embeddings.dtype)


def _weights(place: Tensor, size: Tensor, source: int) -> Tensor:
    """Weights of ``source`` entries in the entry at a place of an axis that is resized, ``(samples, patches, source)``.

    A triangle around the place in the source, as wide as one entry of the larger of both grids, with a sum of one.

    Args:
        place: ``(samples, patches)`` integers.
        size: entries of the resized axis, ``(samples, 1)`` integers.
        source: entries of the axis before.
    """
    scale = source / size.float()
    centre = (place.float() + 0.5) * scale
    entries = torch.arange(source, device=place.device).float() + 0.5
    distance = (entries - centre.unsqueeze(2)) / scale.clamp(min=1.0).unsqueeze(2)
    weights = (1.0 - distance.abs()).clamp(min=0.0)
    return weights / weights.sum(2, keepdim=True)


def resize_in_graph(module: nn.Module) -> None:
    """Let the parts of a model that resize their position embeddings do it by ``resized``, in place."""
    for child in module.modules():
        if hasattr(type(child), METHOD):
            setattr(child, METHOD, resized)
