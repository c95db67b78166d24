"""Data sets from batches in memory, given by the Python interface or by user functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.source import Role
from mlorq.errors import DataError
from mlorq.models.batches import batch_samples, sample_tensors

FEWEST_SAMPLES = 2


def from_batches(batches: Iterable[Any], role: Role = "calibration") -> Dataset:
    """A data set of batches in memory.

    Args:
        batches: each a tensor, or a tuple or mapping of tensors; the first axis of a tensor counts samples. Batches
            without samples are left out.
        role: names the data in errors.

    Raises:
        DataError: there are fewer than ``FEWEST_SAMPLES`` samples, a batch does not hold tensors, or values are not
            finite.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise DataError("batches must be a sequence of batches, each a tensor, a tuple or a mapping of tensors")
    listed: list[Any] = []
    samples = 0
    for index, batch in enumerate(batches):
        try:
            count = batch_samples(batch)
        except Exception as error:
            raise DataError(f"{role} batch {index}: {error}") from error
        for place, tensor in sample_tensors(batch):
            if tensor.is_floating_point() and not (torch.isfinite(tensor).all() or _is_mask(tensor)):
                name = f"entry {'.'.join(map(str, place))!r}" if place else "the tensor"
                raise DataError(f"{role} batch {index}: {name} contains NaN or infinite values")
        samples += count
        listed += [batch] if count else []
    check_size(samples, role)
    return Dataset(listed, samples, digest_json([digest_batch(batch) for batch in listed]))


def check_size(samples: int, role: Role) -> None:
    """Refuse data with too few samples.

    Raises:
        DataError: there are fewer than ``FEWEST_SAMPLES``.
    """
    if samples < FEWEST_SAMPLES:
        raise DataError(f"the {role} data has {samples} samples; give at least {FEWEST_SAMPLES}")


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is added to scores: 0 where attention is allowed, else minus infinity."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())
