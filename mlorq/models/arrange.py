"""Which tensors of a batch belong to single samples, found by running the model on some of the samples.

A leading size alone can mislead: a mask over T tokens looks like T samples if a batch has as many, and a list of images
like several arguments. A reading of the batch is right if the model gives some of the samples the outputs that they
have in the whole batch. Only batches that can be read in more than one way are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch, Listed, Shared, batch_samples, move_batch, sample_tensors, take_samples

CLOSE = 1e-3  # largest relative difference of the outputs: kernels may depend on the number of samples
FEWEST = 2  # batches of one sample are not taken apart

Reading = Callable[[Batch], list[Batch]]


def arranged(model: FloatModel, batches: Sequence[Batch], device: torch.device | str = "cpu") -> Sequence[Batch]:
    """The batches with the marks that the first of them needs; items of lists of samples become batches of their own.

    Args:
        model: the float model, on ``device``.
        batches: the batches of a data set, all of one structure.
        device: device of the model.
    """
    if not batches or not _is_ambiguous(batches):
        return batches
    first = move_batch(batches[0], device, model.dtype)
    try:
        with torch.no_grad():
            wanted = model.outputs(model.module, first)
        for reading in _readings(batches[0]):
            if _holds(model, reading(first), wanted):
                return [part for batch in batches for part in reading(batch)]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model cannot be run on the batch: reported where its layers are searched
        return batches
    return batches


def _is_ambiguous(batches: Sequence[Batch]) -> bool:
    first = batches[0]
    if not isinstance(first, (Mapping, tuple, list)) or isinstance(first, Listed):
        return False
    found = list(sample_tensors(first))
    if len(found) < FEWEST:
        return False
    if not isinstance(first, Mapping) and len({value.dim() for _, value in found}) == 1:
        return True
    others = dict(sample_tensors(batches[1])) if len(batches) > 1 else {}
    return any(
        (value.dim() > 1 and value.shape[0] == value.shape[1]) or others.get(place) is value for place, value in found
    )


def _readings(batch: Batch) -> Iterator[Reading]:
    """The ways to read a batch, the most likely first."""
    yield lambda whole: [whole]
    for place, _ in sample_tensors(batch):
        yield _with_shared(place)
    if isinstance(batch, (tuple, list)):
        yield lambda whole: [Listed([item]) for item in whole]


def _with_shared(place: tuple[Any, ...]) -> Reading:
    return lambda whole: [_marked(whole, place)]


def _marked(value: Any, place: tuple[Any, ...]) -> Any:
    """The value with a ``Shared`` mark around the tensor at a place."""
    if not place:
        return Shared(value)
    key, *rest = place
    if isinstance(value, Mapping):
        return {name: _marked(item, tuple(rest)) if name == key else item for name, item in value.items()}
    items = [_marked(item, tuple(rest)) if index == key else item for index, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _holds(model: FloatModel, parts: list[Batch], wanted: Tensor) -> bool:
    """Whether some of the samples have the outputs that they have together with the others."""
    try:
        total = sum(batch_samples(part) for part in parts)
        if len(wanted) != total:
            return False
        if len(parts) == 1:
            if total < FEWEST:
                return True
            parts = [take_samples(parts[0], slice(0, total - 1))]
        with torch.no_grad():
            found = model.outputs(model.module, parts[0])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # read wrongly, the batch may be anything to the model
        return False
    expected = wanted[: len(found)]
    return found.shape == expected.shape and bool((found - expected).norm() <= CLOSE * expected.norm())
