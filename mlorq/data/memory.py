"""Batches in memory as a data set: those of the Python interface and of the user's own functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.source import Role
from mlorq.errors import DataError
from mlorq.models.base import batch_samples

FEWEST_SAMPLES = 2


def from_batches(batches: Iterable[Any], role: Role = "calibration") -> Dataset:
    """Batches in memory as calibration data or as held-out data.

    Args:
        batches: of samples, each a tensor, a tuple or a mapping of tensors.
        role: what messages call them.

    Raises:
        DataError: there are none, they do not hold tensors, or values that are not finite.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise DataError("batches must be a sequence of batches, each a tensor, a tuple or a mapping of tensors")
    listed = list(batches)
    samples = 0
    for index, batch in enumerate(listed):
        try:
            samples += batch_samples(batch)
        except Exception as error:
            raise DataError(f"{role} batch {index}: {error}") from error
        for name, tensor in _tensors(batch):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DataError(f"{role} batch {index}: {name} holds NaN or infinite values")
    check_size(samples, role)
    return Dataset(listed, samples, digest_json([digest_batch(batch) for batch in listed]))


def check_size(samples: int, role: Role) -> None:
    """Refuse data with too few samples to tell anything from.

    Raises:
        DataError: there are fewer than ``FEWEST_SAMPLES``.
    """
    if samples < FEWEST_SAMPLES:
        raise DataError(f"the {role} data has {samples} samples; at least {FEWEST_SAMPLES} are needed")


def _tensors(batch: Any) -> Sequence[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        return [("the tensor", batch)]
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return [(f"entry {name!r}", value) for name, value in items if isinstance(value, Tensor)]
