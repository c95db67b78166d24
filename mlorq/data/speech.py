"""Batches of recordings for models of speech, with the word error rate of what they hear; used by source ``audio``.

Recordings are sorted by length, so that batches need little padding. A model that takes no mask of the padding gets
batches of recordings of equal length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset, Predicted
from mlorq.data.metrics import WORD_ERRORS, spoken_words, word_errors
from mlorq.data.recordings import decoded_recording
from mlorq.data.source import BatchSettings, Role
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.recogniser import Recogniser


@dataclass(frozen=True)
class Recording:
    """One encoded recording.

    Attributes:
        name: its file, for errors.
        data: the encoded bytes.
        text: its transcript; None without one.
    """

    name: str
    data: bytes
    text: str | None


def speech_dataset(
    recordings: Sequence[Recording], settings: BatchSettings, role: Role, inputs: Recogniser, origin: str
) -> Dataset:
    """A data set of recordings as the model takes them.

    Args:
        recordings: the chosen recordings; all or none of them have a transcript.
        settings: with the batch size.
        role: calibration or evaluation. The latter has the metric ``wer``; recordings of the former are cut at the
            length that the model hears.
        inputs: the model's preparation and decoding.
        origin: the data set's name in errors.

    Raises:
        DataError: a recording cannot be read, or is too long for the metric; or the transcripts have no words.
    """
    heard = [decoded_recording(each.data, each.name, inputs.rate) for each in recordings]
    if inputs.longest is not None:
        most = int(inputs.longest * inputs.rate)
        for each, values in zip(recordings, heard, strict=True):
            if role == "evaluation" and len(values) > most:
                seconds = len(values) / inputs.rate
                raise DataError(
                    f"recording {each.name} takes {seconds:.1f} s, but the model hears {inputs.longest:g} s: cut it"
                )
        heard = [values[:most] for values in heard]
    parts = parts_by_length([len(values) for values in heard], settings.batch_size, alike=inputs.equal_lengths)
    texts = [each.text for each in recordings if each.text is not None]
    known = texts if len(texts) == len(recordings) else None
    batches = [
        inputs.prepare([heard[index] for index in part], None if known is None else [known[index] for index in part])
        for part in parts
    ]
    described: dict[str, Any] = {
        "batches": [digest_batch(batch) for batch in batches],
        "preprocessing": inputs.described,
    }
    if role == "calibration" or known is None:
        return Dataset(batches, len(recordings), digest_json(described))
    if not any(map(spoken_words, known)):
        raise DataError(f"{origin}: the transcripts have no words")
    ordered = [[known[index] for index in part] for part in parts]
    described |= {"metric": WORD_ERRORS, "transcripts": ordered}
    evaluate = _WordErrorRate(batches, ordered, inputs)
    return Dataset(batches, len(recordings), digest_json(described), WORD_ERRORS, evaluate=evaluate)


def parts_by_length(lengths: Sequence[int], size: int, *, alike: bool) -> list[list[int]]:
    """Indices of the samples of each batch, from the shortest to the longest; ``alike``: of one length each."""
    parts: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        last = parts[-1] if parts else []
        if last and len(last) < size and not (alike and lengths[last[0]] != lengths[index]):
            last.append(index)
        else:
            parts.append([index])
    return parts


@dataclass(frozen=True)
class _WordErrorRate:
    """Word errors of all recordings over the number of their words."""

    batches: Sequence[Mapping[str, Any]]
    transcripts: Sequence[Sequence[str]]
    inputs: Recogniser

    def __call__(self, module: nn.Module) -> dict[str, float]:
        found = self.predictions(module)
        errors, total = 0, 0
        for text, wanted in zip(found.predictions, map(spoken_words, found.references), strict=True):
            errors += word_errors(spoken_words(text), wanted)
            total += len(wanted)
        return {WORD_ERRORS: errors / total}

    def predictions(self, module: nn.Module) -> Predicted:
        """What the model hears, and the transcripts, as they are written."""
        floating = next(value for value in module.parameters() if value.is_floating_point())
        heard: list[str] = []
        with torch.no_grad():
            for batch in self.batches:
                heard += self.inputs.transcribe(module, move_batch(batch, floating.device, floating.dtype))
        return Predicted("texts", heard, [text for part in self.transcripts for text in part])
