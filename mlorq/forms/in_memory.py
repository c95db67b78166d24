"""What the compressed layers of a loaded model keep in memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Literal

from torch import nn

from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import CompressedEmbedding

Weights = Literal["packed", "dense", "both"]


def keep_in_memory(module: nn.Module, weights: Weights) -> None:
    """Choose what the compressed layers of a module keep, in place.

    Outputs are the same bit for bit. Embedding tables stay packed in any case: a lookup decodes single rows.

    Args:
        module: the compressed model.
        weights: ``packed``: codes, decoded in every forward pass (least memory, many times the time of a small batch);
            ``dense``: float matrices, without codes (memory and time of the float model; it cannot be saved again);
            ``both``: codes, and float matrices after their first use (most memory, time of the float model).
    """
    dropped: dict[str, CompressedModule] = {}
    for layer in module.modules():
        if not isinstance(layer, CompressedModule):
            continue
        layer.cache = weights == "both"
        layer.drop_cache()
        if weights == "dense" and not isinstance(layer, CompressedEmbedding):
            layer.drop_codes(dropped.get(layer.layer_name))
            dropped.setdefault(layer.layer_name, layer)


def release_memory() -> None:
    """Return what loading used and freed to the system, where the C library can."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
