"""Data sources: one file each, one line in the registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mlorq.config import ModelConfig, SourceConfig
from mlorq.data import coco, custom, glue, image_folder, image_parquet, table
from mlorq.data.base import Dataset
from mlorq.errors import DataError
from mlorq.hashing import digest_batch, digest_json
from mlorq.models.base import FloatModel, batch_samples

__all__ = ["Dataset", "from_batches", "load_dataset"]

Role = Literal["calibration", "evaluation"]

SOURCES = {
    "image_folder": image_folder.load,
    "image_parquet": image_parquet.load,
    "coco": coco.load,
    "table": table.load,
    "glue": glue.load,
    "custom": custom.load,
}
FEWEST_SAMPLES = 2


def load_dataset(
    source: SourceConfig, role: Role, model: FloatModel, model_config: ModelConfig, folder: str, seed: int
) -> Dataset:
    """Load the data that a configuration names, in the form that the model takes.

    Args:
        source: the ``calibration`` or ``evaluation`` section.
        role: which of the two; evaluation data has a metric.
        model: the float model.
        model_config: its configuration (preprocessing, tokenizer, task).
        folder: where relative paths start.
        seed: of the choice of ``samples``.

    Raises:
        DataError: the data is missing, malformed or too small, or evaluation data has labels that the model cannot
            give. Labels of calibration data, which few costs look at, are for the caller to check.
    """
    found = SOURCES[source.source](source, role, model_config, folder, seed)
    if source.source == "custom" and role == "calibration":
        found = from_batches(found.batches)
    elif source.batches is not None:
        held_out = from_batches(found.batches, "evaluation")
        key = digest_json([found.key, held_out.key])
        found = replace(found, batches=held_out.batches, samples=held_out.samples, key=key)
    if role == "calibration":
        _check_size(found.samples, role)
    else:
        found.check_labels(model)
    return found


def from_batches(batches: Iterable[Any], role: Role = "calibration") -> Dataset:
    """Batches in memory as calibration data or as held-out data.

    Args:
        batches: of samples, each a tensor, a tuple or a mapping of tensors.
        role: what messages call them.

    Raises:
        DataError: there are none, they hold no tensors, or values that are not finite.
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
    _check_size(samples, role)
    return Dataset(listed, samples, digest_json([digest_batch(batch) for batch in listed]))


def _check_size(samples: int, role: Role) -> None:
    if samples < FEWEST_SAMPLES:
        raise DataError(f"the {role} data has {samples} samples; at least {FEWEST_SAMPLES} are needed")


def _tensors(batch: Any) -> Sequence[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        return [("the tensor", batch)]
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return [(f"entry {name!r}", value) for name, value in items if isinstance(value, Tensor)]
