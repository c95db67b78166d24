"""Masks of the tokens that are not padding: which of a batch's masks belongs to a tensor in the model.

A model with an encoder and a decoder reads two sequences per sample. Their lengths tell which mask belongs to a tensor,
so that sources make batches in which they differ.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

TokenMask = Tensor | tuple[Tensor, ...] | None
"""Bool masks, each ``(samples, tokens)``, True where a token counts: one per sequence; None: there is no padding."""


def masks_of(mask: TokenMask) -> tuple[Tensor, ...]:
    """The masks of all sequences."""
    return (mask,) if isinstance(mask, Tensor) else mask or ()


def mask_for(layer: str, mask: TokenMask, alone: Collection[str]) -> TokenMask:
    """The masks of a batch for one layer: None if its inputs are some of the tokens, in an order of their own.

    Args:
        layer: name of the layer.
        mask: masks of the batch.
        alone: names of such layers (``LayerList.alone``).
    """
    return None if layer in alone else mask


def counting(mask: TokenMask, tokens: Tensor, axis: int = 1) -> Tensor | None:
    """The mask that covers ``tokens``; None: all of them count.

    Args:
        mask: masks of a batch.
        tokens: ``(samples, tokens, …)``, or with the tokens on another axis.
        axis: axis of the tokens.
    """
    if tokens.dim() < 2:
        return None
    shape = (tokens.shape[0], tokens.shape[axis])
    return next((one for one in masks_of(mask) if tuple(one.shape) == shape), None)
