"""Batches of recordings for classifiers, with the accuracy of their classes; used by source ``audio``.

Recordings are sorted by length, as those of speech are. What a feature extractor does not read of a long one is cut,
as it is by the library's pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset, LabelCheck
from mlorq.data.images import Accuracy
from mlorq.data.recordings import decoded_recording
from mlorq.data.source import BatchSettings, Role
from mlorq.data.speech import Recording, parts_by_length
from mlorq.errors import DataError, one_line
from mlorq.models.transformers_sounds import SoundClassifier

SHOWN = 8  # names of classes in an error


def sound_dataset(
    recordings: Sequence[Recording],
    places: Sequence[str],
    settings: BatchSettings,
    role: Role,
    inputs: SoundClassifier,
) -> Dataset:
    """A data set of recordings as the model takes them; evaluation data has the metric ``accuracy``.

    Args:
        recordings: the chosen recordings; the text of each is its class, by name or number, or all have none.
        places: where each class is, for errors.
        settings: with the batch size.
        role: calibration or evaluation.
        inputs: the model's preparation.

    Raises:
        DataError: a recording cannot be read, or is too short for the model; or a class is unknown.
    """
    heard = [decoded_recording(each.data, each.name, inputs.rate) for each in recordings]
    parts = parts_by_length([len(values) for values in heard], settings.batch_size, alike=inputs.equal_lengths)
    batches = [
        _prepared([heard[index] for index in part], [recordings[i].name for i in part], inputs) for part in parts
    ]
    described: dict[str, Any] = {
        "batches": [digest_batch(batch) for batch in batches],
        "preprocessing": inputs.described,
    }
    order = [index for part in parts for index in part]
    if any(each.text is None for each in recordings):
        return Dataset(batches, len(recordings), digest_json(described))
    labels = np.array([_class(str(recordings[index].text), places[index], inputs.names) for index in order])
    check = LabelCheck(labels, lambda place: places[order[place]])
    if role == "calibration":
        # The key leaves calibration labels out, so that results that do not depend on them are reused.
        known = list(torch.split(torch.from_numpy(labels), [len(part) for part in parts]))
        return Dataset(batches, len(recordings), digest_json(described), labels=known, label_check=check)
    described |= {"metric": "accuracy", "labels": labels.tolist()}
    key = digest_json(described)
    return Dataset(batches, len(recordings), key, "accuracy", Accuracy(labels), label_check=check)


def _prepared(recordings: Sequence[np.ndarray], names: Sequence[str], inputs: SoundClassifier) -> Any:
    """A batch; the recording that the feature extractor refuses is named."""
    try:
        return inputs.prepare(recordings)
    except (ValueError, AssertionError, RuntimeError, IndexError):
        for values, name in zip(recordings, names, strict=True):
            try:
                inputs.prepare([values])
            except (ValueError, AssertionError, RuntimeError, IndexError) as error:
                seconds = len(values) / inputs.rate
                text = one_line(error)
                raise DataError(f"recording {name} of {seconds:.3f} s cannot be prepared: {text}") from error
        raise


def _class(text: str, where: str, names: Sequence[str]) -> int:
    """The number of a class that is given by name, or by number."""
    text = text.strip()
    if text in names:
        return list(names).index(text)
    try:
        return int(text)  # out of range: found when it is compared with the model's outputs
    except ValueError:
        some = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        raise DataError(f"{where}: {text!r} is none of the model's classes: {some}") from None
