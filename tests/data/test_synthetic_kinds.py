"""Source ``synthetic`` for every kind of input: batches as real ones have, on which the model runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlorq.config.sections import model_section, source_section
from mlorq.data import Dataset, load_dataset
from mlorq.data.noise import random_boxes, texts_of_tokens
from mlorq.data.speech_noise import KNEE, speech_noise
from mlorq.errors import DataError
from mlorq.models import load_model
from mlorq.models.base import FloatModel
from tests import zoo
from tests.long import few
from tests.models import (
    test_choices,
    test_depth,
    test_encoder_decoder,
    test_mask_generation,
    test_sounds,
    test_speech,
    test_two_towers,
)

RATE = 16000


def language_model(folder: Path) -> None:
    test_choices.save_decoder(folder / "model")


def reader(folder: Path) -> None:
    test_choices.save_reader(folder / "model")


# Name: what saves the model, its task, and the keys of a batch.
KINDS: dict[str, tuple[Callable[[Path], Any], str, set[str]]] = {
    "depths": (lambda folder: test_depth.save(folder), "depth-estimation", {"pixel_values"}),
    "prompted": (lambda folder: test_mask_generation.save(folder), "mask-generation", {"pixel_values", "input_boxes"}),
    "two towers": (
        lambda folder: test_two_towers.save(folder, "clip"),
        "zero-shot-image-classification",
        {"pixel_values", "input_ids", "attention_mask"},
    ),
    "whisper": (
        lambda folder: test_speech.save(folder, "whisper"),
        "automatic-speech-recognition",
        {"input_features", "decoder_input_ids", "decoder_attention_mask"},
    ),
    "hubert": (lambda folder: test_speech.save(folder, "hubert"), "automatic-speech-recognition", {"input_values"}),
    "sounds": (lambda folder: test_sounds.save(folder, "ast"), "audio-classification", {"input_values"}),
    "targets": (
        lambda folder: test_encoder_decoder.save(folder, "t5"),
        "text2text-generation",
        {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"},
    ),
    "language": (language_model, "text-generation", {"input_ids", "attention_mask"}),
    "choices": (reader, "multiple-choice", {"input_ids", "attention_mask", "token_type_ids"}),
}


def loaded(folder: Path, task: str, **values: Any) -> tuple[FloatModel, Dataset]:
    source = source_section()(source="synthetic", samples=5, batch_size=3, **{"max_length": 12, **values})
    model = model_section()(family="transformers", name="./model", task=task)
    found = load_model(model, str(folder))
    return found, load_dataset(source, "calibration", found, model, str(folder), 0)


@pytest.mark.parametrize("kind", few(KINDS, "prompted", "two towers", "whisper", "targets", "choices"))
def test_the_model_runs_on_made_inputs(kind: str, tmp_path: Path) -> None:
    save, task, keys = KINDS[kind]
    save(tmp_path)
    model, data = loaded(tmp_path, task)
    assert data.samples == 5
    assert [set(batch) for batch in data.batches] == [keys, keys]
    with torch.no_grad():
        outputs = torch.cat([model.outputs(model.module, batch).flatten(1) for batch in data.batches])
    assert len(outputs) == 5
    assert torch.isfinite(outputs).all()
    assert (outputs - outputs[:1]).abs().amax(1)[1:].gt(0).all(), "samples differ"
    again = loaded(tmp_path, task)[1]
    assert again.key == data.key
    assert loaded(tmp_path, task, seed=1)[1].key != data.key


def test_a_language_model_reads_whole_pieces(tmp_path: Path) -> None:
    language_model(tmp_path)
    _, data = loaded(tmp_path, "text-generation")
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(3, 12), (2, 12)]


@pytest.mark.parametrize("task", ["text-generation", "multiple-choice"])
def test_pairs_are_for_classifiers(task: str, tmp_path: Path) -> None:
    (reader if task == "multiple-choice" else language_model)(tmp_path)
    with pytest.raises(DataError, match=r"^source synthetic: pairs is for classifiers of two texts; leave pairs out$"):
        loaded(tmp_path, task, pairs=True)


def test_recordings_have_the_spectrum_and_the_rhythm_of_speech() -> None:
    made = speech_noise(8, 8.0, RATE, 3)
    assert made.shape == (8, 8 * RATE)
    assert made.dtype == np.float32
    assert np.abs(made).max() == pytest.approx(0.5)
    assert np.array_equal(speech_noise(2, 8.0, RATE, 3), made[:2])
    frequency = np.fft.rfftfreq(made.shape[1], 1 / RATE)
    power = (np.abs(np.fft.rfft(made.astype(float))) ** 2).mean(0)

    def level(low: float, high: float) -> float:
        return float(10 * np.log10(power[(frequency > low) & (frequency < high)].mean()))

    # 9 dB per octave: from 1000 to 4000 Hz twice that.
    assert level(900, 1100) - level(3800, 4200) == pytest.approx(18, abs=2)
    assert level(200, KNEE) - level(100, 200) == pytest.approx(0, abs=1.5)
    # The logarithm of the loudness has its power between 2 and 8 Hz.
    loud = np.log(np.abs(made.astype(float)).reshape(8, -1, RATE // 50).mean(2) + 1e-12)
    slow = (np.abs(np.fft.rfft(loud - loud.mean(1, keepdims=True))) ** 2).mean(0)
    rates = np.fft.rfftfreq(loud.shape[1], 1 / 50)
    assert slow[(rates >= 2) & (rates <= 8)].sum() > 0.5 * slow.sum()


def test_lengths_of_recordings_may_be_odd_and_short() -> None:
    assert speech_noise(1, 0.00032, RATE, 0).shape == (1, 5)
    assert np.isfinite(speech_noise(2, 1e-6, RATE, 0)).all()


def test_boxes_lie_in_their_images() -> None:
    sizes = [(40, 30), (7, 90)] * 20
    for (width, height), (left, top, right, bottom) in zip(sizes, random_boxes(sizes, 1), strict=True):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0.2 <= (right - left) / width <= 0.8


def test_texts_have_as_many_tokens_as_are_needed() -> None:
    tokens = zoo.tokenizer()
    texts = texts_of_tokens(tokens, 1000, 0)
    assert sum(map(len, tokens(texts, add_special_tokens=False)["input_ids"])) >= 1000


def test_maps_and_answers_are_made_too(tmp_path: Path) -> None:
    """Tasks whose labels have a form of their own need none here."""
    config = transformers.BertConfig(**test_choices.SIZES)
    module = zoo.randomised(transformers.BertForQuestionAnswering(config), 0)
    module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    model, data = loaded(tmp_path, "question-answering")
    assert data.batches[0]["token_type_ids"].amax(1).eq(1).all(), "a question and a text"
    assert torch.isfinite(model.outputs(model.module, data.batches[0])).all()
