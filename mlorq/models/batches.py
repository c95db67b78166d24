"""Batches: nested inputs of a model, and which part of them belongs to which sample.

A batch is a tensor, or tensors in tuples, lists and mappings. A tensor belongs to the samples one by one if its leading
size is their number. Two marks cover the other cases: ``Shared`` for a tensor that serves all samples, such as a mask
over tokens; ``Listed`` for a list whose items are the samples, such as images of various sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlorq.errors import ModelError

Batch = Any  # inputs of a model: a tensor, a tuple or list of tensors, or a mapping of tensors


@dataclass(frozen=True)
class Shared:
    """A tensor in a batch that serves all samples; models get the tensor itself (``fresh``)."""

    tensor: Tensor


class Listed(list[Any]):
    """A batch whose items are the samples; it is passed to the model as one argument."""


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested value with each tensor changed; other values stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Shared):
        return Shared(change(value.tensor))
    return map_items(value, lambda item: map_tensors(item, change))


def map_items(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same mapping, tuple or list with each item changed; another value stays."""
    if isinstance(value, Mapping):
        return {name: change(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    return type(value)(change(item) for item in value) if isinstance(value, (tuple, list)) else value


def fresh(value: Any) -> Any:
    """The same nested value with copies of its tensors, which are never inference tensors, and without marks."""
    if isinstance(value, Shared):
        return value.tensor.clone()
    return value.clone() if isinstance(value, Tensor) else map_items(value, fresh)


def unmarked(value: Any) -> Any:
    """The same nested value without ``Shared`` marks."""
    return value.tensor if isinstance(value, Shared) else map_items(value, unmarked)


def move_batch(batch: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """A batch on ``device``, with floating-point tensors cast to ``dtype`` unless it is None."""
    return map_tensors(
        batch, lambda value: value.to(device, dtype if dtype is not None and value.is_floating_point() else None)
    )


def sample_tensors(batch: Batch, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors of a batch that can belong to single samples, each with its place: keys and indices."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield place, batch
    elif isinstance(batch, Mapping):
        for name, value in batch.items():
            yield from sample_tensors(value, (*place, name))
    elif isinstance(batch, (tuple, list)):
        for index, value in enumerate(batch):
            yield from sample_tensors(value, (*place, index))


def batch_samples(batch: Batch) -> int:
    """Number of samples in a batch: the most frequent leading size of its tensors, the first of equally frequent ones.

    A leading size of 1 counts only if there is no other: it stands for all samples, as in position ids.

    Raises:
        ModelError: the batch contains no tensor.
    """
    if isinstance(batch, Listed):
        return len(batch)
    sizes = [int(value.shape[0]) for _, value in sample_tensors(batch)]
    if not sizes:
        raise ModelError("a batch must be a tensor, or a tuple, list or mapping that contains one")
    counts = Counter([size for size in sizes if size != 1] or sizes)
    return counts.most_common(1)[0][0]


def take_samples(batch: Batch, index: slice) -> Batch:
    """A slice of the samples of a batch: of every tensor whose leading size is the number of samples.

    Tensors of another leading size are marked ``Shared``: in the slice it could be taken for the number of samples.
    """
    if isinstance(batch, Listed):
        return Listed(batch[index])
    count = batch_samples(batch)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0:
                return value
            return value[index] if value.shape[0] == count else Shared(value)
        return map_items(value, take)

    return take(batch)


def split_batches(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same samples in batches of at most ``size``."""
    return [
        take_samples(batch, slice(start, start + size))
        for batch in batches
        for start in range(0, batch_samples(batch), size)
    ]


def fold_batches(batches: Sequence[Batch], fold: int, folds: int = 2) -> list[Batch]:
    """Every ``folds``-th sample, counted across all batches, starting at sample ``fold``; empty batches are dropped."""
    found, first = [], 0
    for batch in batches:
        count = batch_samples(batch)
        start = (fold - first) % folds
        if start < count:
            found.append(take_samples(batch, slice(start, None, folds)))
        first += count
    return found


def describe_batch(batch: Batch) -> str:
    """Types and shapes of a batch, for messages: ``tuple of Tensor (8, 3), Tensor (8,)``."""
    if isinstance(batch, Shared):
        return describe_batch(batch.tensor)
    if isinstance(batch, Tensor):
        return f"Tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "mapping of " + ", ".join(f"{name}: {describe_batch(value)}" for name, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return f"{'tuple' if isinstance(batch, tuple) else 'list'} of " + ", ".join(map(describe_batch, batch))
    return type(batch).__name__
