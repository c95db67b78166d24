"""Recognisers of speech from transformers: Whisper and others with a decoder; wav2vec 2.0, HuBERT and others of CTC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError, one_line
from mlorq.models.batches import Batch
from mlorq.models.encoder_decoder import decoder_batch, shifter, without_values
from mlorq.models.hub_names import load_problem
from mlorq.models.recogniser import Recogniser
from mlorq.models.speech_outputs import frame_mask
from mlorq.models.transformers import TransformersSettings, quiet
from mlorq.models.transformers_modules import model_class

INPUTS = ("input_features", "input_values", "attention_mask")  # of the encoder
LONGEST = 448  # tokens of a transcript, those of Whisper, unless the model says less
# Entries of a feature extractor that do not affect the batches.
NOT_PREPROCESSING = ("_processor_class", "feature_extractor_type", "processor_class")


def recogniser(settings: TransformersSettings, location: str, language: str | None = None) -> Recogniser:
    """Preparation and decoding of a model's recordings.

    Args:
        settings: settings of the model.
        location: folder or hub name of the model.
        language: language of the recordings, for a model of several; None: the model detects it.

    Raises:
        ModelError: its feature extractor, tokenizer or configuration cannot be loaded, it is no model of speech, or it
            does not take a language.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

    name = settings.name
    try:
        with quiet():
            config = AutoConfig.from_pretrained(location)
            extractor = AutoFeatureExtractor.from_pretrained(location)
            tokenizer = AutoTokenizer.from_pretrained(location)
            generation = _generation(location, config)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        text = load_problem(error, location)
        raise ModelError(f"model {name!r}: its feature extractor or tokenizer cannot be loaded: {text}") from error
    kind = model_class(settings.task, type(config))
    decodes = bool(config.is_encoder_decoder)
    if kind is None or not (decodes or type(config) in AutoModelForCTC._model_mapping):
        raise ModelError(
            f"model {name!r} ({config.model_type}) does not recognise speech by an encoder and a decoder, or by CTC"
        )
    if language is not None:
        if not getattr(generation, "is_multilingual", False):
            raise ModelError(f"model {name!r} does not take a language: leave out language")
        try:
            tokenizer.set_prefix_tokens(language=language, task="transcribe")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"model {name!r}: language {language!r}: {one_line(error)}") from error
    with quiet():
        empty = without_values(kind, config)
    shift = shifter(empty) if decodes else None
    longest = getattr(config, "max_target_positions", None)
    rate = int(extractor.sampling_rate)
    limit = getattr(extractor, "chunk_length", None) if config.model_type == "whisper" else None
    masked = bool(getattr(extractor, "return_attention_mask", False))
    padding: Any = True if limit is None else "max_length"

    def prepare(recordings: Sequence[np.ndarray], texts: Sequence[str] | None) -> Batch:
        found = extractor(list(recordings), sampling_rate=rate, padding=padding, return_tensors="pt")
        batch: dict[str, Tensor] = {key: found[key] for key in INPUTS if key in found}
        if "attention_mask" in batch:
            batch["attention_mask"] = batch["attention_mask"].long()
        if shift is None:
            return batch
        rows = tokenizer(list(texts) if texts is not None else [""] * len(recordings))["input_ids"]
        labels = [_labels(row, tokenizer, config)[:longest] for row in rows]
        mask = frame_mask(empty, batch)
        frames = getattr(config, "max_source_positions", 0) if mask is None else mask.shape[1]
        target = decoder_batch(labels, shift, frames)
        return batch | {key: value for key, value in target.items() if key != "labels"}

    def transcribe(module: nn.Module, batch: Batch) -> list[str]:
        inputs = {key: value for key, value in batch.items() if key in INPUTS}
        if decodes:
            options = {} if language is None else {"language": language, "task": "transcribe"}
            generate: Any = module.generate
            with quiet():
                ids = generate(**inputs, generation_config=generation, do_sample=False, num_beams=1, **options)
            texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
            return texts
        best = module(**inputs).logits.argmax(-1)
        mask = frame_mask(module, inputs)
        if mask is None or mask.shape != best.shape:
            mask = torch.ones_like(best, dtype=torch.bool)
        return [str(tokenizer.decode(row[own].tolist())) for row, own in zip(best, mask, strict=True)]

    described = json.loads(extractor.to_json_string())
    described = {key: value for key, value in described.items() if key not in NOT_PREPROCESSING}
    described["language"] = language
    alike = limit is None and not masked
    return Recogniser(rate, limit, decodes, alike, prepare, transcribe, described, tokenizer)


def _generation(location: str, config: Any) -> Any:
    """The settings of a model's generation, which checkpoints do not have."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(location)
    except OSError:  # there is no such file
        found = GenerationConfig.from_model_config(config)
    if found.max_new_tokens is None and found.max_length == GenerationConfig().max_length:
        # The usual number of tokens, if nothing else is said, would cut transcripts.
        positions = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
        found.max_length = min(next((most for most in positions if most), LONGEST), LONGEST)
    return found


def _labels(row: Sequence[int], tokenizer: Any, config: Any) -> list[int]:
    """The tokens that a decoder predicts for a transcript: without the one that it starts with."""
    found = list(row)
    if found and found[0] == config.decoder_start_token_id:
        found = found[1:]
    return found or [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id]
