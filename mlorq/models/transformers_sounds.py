"""Classifiers of recordings from transformers: AST, wav2vec 2.0, HuBERT, Whisper's encoder and their like."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlorq.errors import ModelError
from mlorq.models.batches import Batch
from mlorq.models.hub_names import load_problem
from mlorq.models.transformers import TransformersSettings, class_names, quiet
from mlorq.models.transformers_speech import INPUTS, NOT_PREPROCESSING

SHORT, LONG = 0.1, 0.2  # seconds of two recordings whose batches are compared


@dataclass(frozen=True)
class SoundClassifier:
    """Preparation of recordings for a classifier.

    Attributes:
        rate: its sampling rate in Hz.
        equal_lengths: whether all recordings of a batch must have the same length, because the model takes no mask and
            its feature extractor does not pad them to one length.
        prepare: makes a batch of mono recordings, ``(amplitudes,)`` float32 at ``rate``.
        names: of the classes, in the order of the outputs.
        described: settings of the preparation as JSON values; part of the key of the data.
    """

    rate: int
    equal_lengths: bool
    prepare: Callable[[Sequence[np.ndarray]], Batch]
    names: Sequence[str]
    described: dict[str, Any]


def sound_classifier(settings: TransformersSettings, location: str, folder: str) -> SoundClassifier:
    """Preparation of a model's recordings.

    Args:
        settings: settings of the model.
        location: folder or hub name of the model.
        folder: folder that relative paths start from.

    Raises:
        ModelError: its feature extractor or configuration cannot be loaded.
    """
    from transformers import AutoFeatureExtractor

    try:
        with quiet():
            extractor: Any = AutoFeatureExtractor.from_pretrained(location)
        rate = int(extractor.sampling_rate)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        text = load_problem(error, location)
        raise ModelError(f"model {settings.name!r}: its feature extractor cannot be loaded: {text}") from error
    padding: Any = "max_length" if getattr(extractor, "chunk_length", None) else True  # Whisper hears 30 seconds

    def prepare(recordings: Sequence[np.ndarray]) -> Batch:
        found = extractor(list(recordings), sampling_rate=rate, padding=padding, return_tensors="pt")
        batch = {key: found[key] for key in INPUTS if key in found}
        return {key: value.long() if key == "attention_mask" else value for key, value in batch.items()}

    silent = (prepare([np.zeros(int(seconds * rate), np.float32)]) for seconds in (SHORT, LONG))
    short, long = ({key: value.shape for key, value in batch.items()} for batch in silent)
    described = json.loads(extractor.to_json_string())
    described = {key: value for key, value in described.items() if key not in NOT_PREPROCESSING}
    alike = short != long and "attention_mask" not in short
    return SoundClassifier(rate, alike, prepare, class_names(settings, folder), described)
