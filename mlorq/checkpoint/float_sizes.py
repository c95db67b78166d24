"""Bytes of the tensors of a model that stay float, by kind.

The kinds are inferred from names and shapes, the only contents of a checkpoint's header: the weight of a norm has one
axis, and position tables are recognised by name. They are used for reports only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("embeddings", "position_tables", "norms", "biases", "layers", "activation_quantizers", "other")
POSITIONS = ("pos_embed", "pos_emb", "position", "rel_pos", "wpe")
QUANTIZERS = ("input_quantizer.", "product_quantizers.")
EMBEDDINGS = ("embed", "wte", "shared", "tokens")


class TensorSize(NamedTuple):
    """Shape and bytes of a tensor."""

    shape: Sequence[int]
    bytes: int


def rest_by_kind(tensors: Mapping[str, TensorSize]) -> dict[str, int]:
    """Bytes of float tensors by kind.

    Args:
        tensors: all tensors that are not compressed, by state-dict name.

    Returns:
        Bytes of ``embeddings``; ``position_tables``, absolute or relative; ``norms`` with their statistics; ``biases``;
        uncompressed ``layers``; ``activation_quantizers``; ``other``.
    """
    found = dict.fromkeys(KINDS, 0)
    norms = {name.rpartition(".")[0] for name, size in tensors.items() if _is_norm(name, size)}
    for name, size in tensors.items():
        found[_kind(name, size, norms)] += size.bytes
    return found


def is_activation_quantizer(name: str) -> bool:
    """Whether a tensor belongs to a quantizer of activations."""
    return any(word in name for word in QUANTIZERS)


def _is_norm(name: str, size: TensorSize) -> bool:
    last = name.rpartition(".")[2]
    return last == "running_mean" or (last == "weight" and len(size.shape) == 1)


def _kind(name: str, size: TensorSize, norms: set[str]) -> str:
    path, _, last = name.rpartition(".")
    if is_activation_quantizer(name):
        return "activation_quantizers"
    if path in norms:
        return "norms"
    if any(word in name for word in POSITIONS):
        return "position_tables"
    if last.endswith("bias"):
        return "biases"
    if last.endswith("weight") and len(size.shape) >= 2:
        return "embeddings" if len(size.shape) == 2 and any(word in path for word in EMBEDDINGS) else "layers"
    return "other"
