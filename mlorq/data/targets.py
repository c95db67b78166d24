"""Batches of texts and the texts to be generated from them, with the perplexity of the latter; used by tables.

A model with an encoder and a decoder (T5, BART, Marian) reads the source text and the target text up to each of its
tokens. Rows are sorted by length, so that batches need little padding.
"""

from __future__ import annotations

from typing import Any

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.choose import seeded_choice
from mlorq.data.language import Perplexity
from mlorq.data.metrics import PERPLEXITY
from mlorq.data.source import Role, TextSettings
from mlorq.data.texts import Rows
from mlorq.errors import DataError
from mlorq.models.encoder_decoder import decoder_batch
from mlorq.models.family import TextInputs

LABELS = "labels"


def target_dataset(
    rows: Rows, settings: TextSettings, role: Role, inputs: TextInputs, folder: str, seed: int
) -> Dataset:
    """A data set of source texts with the inputs of the decoder for their target texts.

    Args:
        rows: all rows of the source: two columns of texts, and no labels; a list of samples is applied here.
        settings: number of samples or list, maximum length of either text in tokens, and batch size.
        role: calibration or evaluation; the latter has the metric ``perplexity``.
        inputs: tokenizer of the model, and the inputs of its decoder.
        folder: base of relative paths.
        seed: of the choice of samples.

    Raises:
        DataError: there are too few rows, the metric is another one, or a target text has no tokens.
        ModelError: the model has no encoder and decoder.
    """
    if settings.metric not in (None, PERPLEXITY):
        raise DataError(f"metric {settings.metric!r} does not fit generated texts; choose {PERPLEXITY}")
    rows = rows.listed(settings, folder)
    sources, targets = rows.texts
    picked = seeded_choice(len(sources), settings.samples, seed, rows.origin)
    assert inputs.shift is not None
    tokenizer, shift = inputs.tokenizer(), inputs.shift()
    limit: dict[str, Any] = {"truncation": True, "max_length": min(settings.max_length, tokenizer.model_max_length)}
    read = tokenizer([sources[index] for index in picked], **limit)["input_ids"]
    written = tokenizer(text_target=[targets[index] for index in picked], **limit)["input_ids"]
    for place, index in enumerate(picked):
        for tokens in (read[place], written[place]):
            if not tokens:
                raise DataError(f"{rows.where(index)}: the source or the target text has no tokens")
    order = sorted(range(len(read)), key=lambda place: (len(read[place]), len(written[place]), place))
    batches, labels = [], []
    for start in range(0, len(order), settings.batch_size):
        part = order[start : start + settings.batch_size]
        padded = tokenizer.pad({"input_ids": [read[place] for place in part]}, padding=True, return_tensors="pt")
        target = decoder_batch([written[place] for place in part], shift, padded["input_ids"].shape[1])
        labels.append(target.pop(LABELS))
        batches.append({name: padded[name] for name in ("input_ids", "attention_mask")} | target)
    described: dict[str, Any] = {"batches": [digest_batch(batch) for batch in batches]}
    if role == "calibration":
        return Dataset(batches, len(order), digest_json(described))
    described |= {"metric": PERPLEXITY, LABELS: [digest_batch(part) for part in labels]}
    evaluate = Perplexity(batches, labels, following=False)
    return Dataset(batches, len(order), digest_json(described), PERPLEXITY, evaluate=evaluate)
