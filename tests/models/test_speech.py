"""Models of speech: Whisper, wav2vec 2.0 and HuBERT. Batches of recordings, f(x), word error rate, exports."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import mlorq
from mlorq.calibration.collect import capture
from mlorq.config.run import RunConfig
from mlorq.data import load_dataset
from mlorq.data.metrics import spoken_words
from mlorq.errors import ConfigError, DataError, ModelError
from mlorq.forms.modules import replace_layers
from mlorq.models import FAMILIES, FloatModel, load_model
from mlorq.models.computed_weights import merge_computed_weights
from mlorq.models.layers import find_layers
from mlorq.models.speech_outputs import frame_mask, speech_logits
from mlorq.models.task_outputs import POSITIONS
from tests import zoo
from tests.compressed import compressed, folder_of, random_layer
from tests.data.test_recordings import tone, wav
from tests.long import few
from tests.models.test_encoder_decoder import with_weights

TASK = "automatic-speech-recognition"
RATE = 16000
WHISPER = {
    "vocab_size": 24,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 50,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
CTC = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
}
MOONSHINE = {
    **{name: WHISPER[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
    "decoder_start_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    **{f"{side}_num_hidden_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_num_attention_heads": 2 for side in ("encoder", "decoder")},
}
MASKED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", WHISPER),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", {**CTC, **MASKED}),
    "hubert": ("HubertConfig", "HubertForCTC", CTC),
    "moonshine": ("MoonshineConfig", "MoonshineForConditionalGeneration", MOONSHINE),
}
SECONDS = [0.09, 0.05, 0.07, 0.05, 0.11, 0.06, 0.08, 0.07]


def made(kind: str) -> nn.Module:
    """A model with random weights."""
    config, name, settings = MODELS[kind]
    module = zoo.randomised(getattr(transformers, name)(getattr(transformers, config)(**settings)), 0)
    module.tie_weights()
    return module


def save(folder: Path, kind: str) -> nn.Module:
    """A model with feature extractor and tokenizer in a folder, and recordings of tones with sentences beside it."""
    module = made(kind)
    module.save_pretrained(folder / "model")
    if kind == "whisper":
        zoo.tokenizer().save_pretrained(folder / "model")
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder / "model")
    elif kind == "moonshine":
        zoo.tokenizer().save_pretrained(folder / "model")
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder / "model")
    else:
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxy"]
        (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
        tokens = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
        tokens.save_pretrained(folder / "model")
        extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=kind == "wav2vec2")
        extractor.save_pretrained(folder / "model")
    (folder / "heard").mkdir()
    lines = ["file\ttext"]
    for index, (seconds, sentence) in enumerate(zip(SECONDS, zoo.SENTENCES, strict=True)):
        noise = np.random.default_rng(index).normal(size=int(seconds * RATE)) * 0.05
        (folder / f"heard/{index}.wav").write_bytes(wav(tone(seconds, RATE, 300.0 + 200 * index) + noise, RATE))
        lines.append(f"{index}.wav\t{sentence}")
    (folder / "heard/all.tsv").write_text("\n".join(lines))
    return module


def run_of(**settings: Any) -> dict[str, Any]:
    """A configuration; ``settings`` of its evaluation data."""
    heard = {"source": "audio", "path": "heard/all.tsv", "audio": "file", "label": "text", "batch_size": 3}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": heard | {"samples": 6}, "evaluation": heard | settings},
    }


def loaded(folder: Path, **settings: Any) -> tuple[FloatModel, Any]:
    config = RunConfig.from_mapping({"budget": "4bit", **run_of(**settings)}, str(folder))
    model = load_model(config.model, str(folder))
    return model, load_dataset(config.data.evaluation, "evaluation", model, config.model, str(folder), 0)


def calibration(folder: Path, values: dict[str, Any]) -> tuple[FloatModel, Any]:
    config = RunConfig.from_mapping({"budget": "4bit", **values}, str(folder))
    model = load_model(config.model, str(folder))
    return model, load_dataset(config.data.calibration, "calibration", model, config.model, str(folder), 0)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(["whisper", "wav2vec2"], "whisper"))
def test_models_are_compressed_and_load_alone(kind: str, tmp_path: Path) -> None:
    module = save(tmp_path, kind)
    result = zoo.run(tmp_path, {**run_of(), "budget": "6bit"})
    assert result["metric"]["name"] == "wer"
    _, data = loaded(tmp_path)
    assert result["metric"]["float"] == data.evaluate(module)["wer"] > 0
    checkpoint = result["checkpoint"].removeprefix("file://")
    found = mlorq.load(checkpoint)
    assert type(found) is type(module)
    assert result["metric"]["compressed"] == data.evaluate(found)["wer"]
    mlorq.export(checkpoint, tmp_path / "dense.safetensors", to="dense")
    original = type(module).from_pretrained(tmp_path / "model")
    merge_computed_weights(original)  # of convolutions, which are stored by their values
    twin = with_weights(original, tmp_path / "dense.safetensors")
    for batch in data.batches:
        with torch.no_grad():
            assert torch.equal(speech_logits(found, batch), speech_logits(twin, batch))
    assert (Path(checkpoint) / "preparation/preprocessor_config.json").is_file()


@pytest.mark.parametrize("kind", few(["whisper", "wav2vec2"]))
def test_graphs_of_models_of_speech(kind: str, tmp_path: Path) -> None:
    """At other numbers of samples, amplitudes and tokens than the example's."""
    pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    save(tmp_path, kind)
    model, data = loaded(tmp_path)
    module = compressed(model.module)
    (file,) = mlorq.export(folder_of(tmp_path / "out", module, model.architecture), tmp_path / "model.onnx")
    graph = mlorq.load(file, runtime="onnxruntime")
    for batch in data.batches:
        with torch.no_grad():
            wanted = module(**batch).logits
        assert float((graph(**batch).logits - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("stays", [True, False])
def test_a_normed_convolution_of_positions_loads_in_transformers(stays: bool, tmp_path: Path) -> None:
    """Compressed or float: the file has its weight by value, and the class computes it from two parameters."""
    save(tmp_path, "wav2vec2")
    model, data = loaded(tmp_path)
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    module = copy.deepcopy(model.module)
    layer = module.get_submodule("lm_head" if stays else name)
    replace_layers(module, {"lm_head" if stays else name: random_layer("layer", layer, 6)})
    mlorq.export(folder_of(tmp_path / "out", module, model.architecture), tmp_path / "folder", to="transformers")
    found = transformers.AutoModelForCTC.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(found(**data.batches[0]).logits, module(**data.batches[0]).logits)


# -- f(x) --------------------------------------------------------------------------------------------------------------


def test_padding_of_recordings_is_no_data(tmp_path: Path) -> None:
    """Frames and outputs of a recording are those of the recording alone."""
    save(tmp_path, "wav2vec2")
    model, data = loaded(tmp_path, batch_size=8)
    (batch,) = data.batches
    rows = [int(count) for count in batch["attention_mask"].sum(1)]
    assert len(set(rows)) > 2
    alone = [
        {name: value[place : place + 1, :count] for name, value in batch.items()} for place, count in enumerate(rows)
    ]
    counts = [model.module(**one).logits.shape[1] for one in alone]
    assert frame_mask(model.module, batch).sum(1).tolist() == counts
    layers = [layer for layer in find_layers(model, batch).layers if "encoder" in layer.name]
    found, wanted = (capture(model, layers, batches, moments=True) for batches in ([batch], alone))
    torch.testing.assert_close(found.reference, wanted.reference, atol=1e-4, rtol=1e-3)
    for name, products in found.inputs.items():
        assert products.counts == wanted.inputs[name].counts
        torch.testing.assert_close(products.means(), wanted.inputs[name].means(), rtol=1e-3, atol=1e-4)


def test_frames_and_tokens_have_masks_of_their_own(tmp_path: Path) -> None:
    """A model that masks frames and reads a transcript: as many frames as it makes of each recording alone."""
    save(tmp_path, "moonshine")
    model, data = loaded(tmp_path, batch_size=8)
    (batch,) = data.batches
    frames, tokens = model.token_mask(batch)
    assert frames.shape != tokens.shape
    encoder: Any = model.module.get_encoder()
    counts = batch["attention_mask"].sum(1).tolist()
    assert sorted(counts) == counts
    for place, count in list(enumerate(counts))[-3:]:  # shorter ones make no frame without the padding
        with torch.no_grad():
            hidden = encoder(batch["input_values"][place : place + 1, :count]).last_hidden_state
        assert int(frames[place].sum()) == hidden.shape[1]
    assert torch.equal(tokens, batch["decoder_attention_mask"] == 1)


def test_the_decoder_reads_the_transcript(tmp_path: Path) -> None:
    """Without the start token, which the model puts before it."""
    module = save(tmp_path, "whisper")
    _, data = loaded(tmp_path, batch_size=8)
    (batch,) = data.batches
    tokens = zoo.tokenizer()
    order = sorted(range(len(SECONDS)), key=lambda index: (int(SECONDS[index] * RATE), index))
    for place, index in enumerate(order):
        labels = torch.tensor([tokens(zoo.SENTENCES[index])["input_ids"][1:]])
        features = batch["input_features"][place : place + 1]
        with torch.no_grad():
            wanted = module(input_features=features, labels=labels).logits[0]
            found = module(**{name: value[place : place + 1] for name, value in batch.items()}).logits[0]
        assert int(batch["decoder_attention_mask"][place].sum()) == labels.shape[1]
        assert torch.allclose(found[: labels.shape[1]], wanted, atol=1e-5)


def test_without_transcripts_the_decoder_reads_its_start_tokens(tmp_path: Path) -> None:
    save(tmp_path, "whisper")
    values = run_of()
    del values["data"]["calibration"]["label"]
    model, data = calibration(tmp_path, values)
    assert data.samples == 6
    for batch in data.batches:
        assert (batch["decoder_input_ids"] == 2).all(), "[CLS], which the tokenizer puts before a text"
        assert model.outputs(model.module, batch).shape == (len(batch["input_features"]), POSITIONS * 24)


# -- the metric --------------------------------------------------------------------------------------------------------


def test_texts_are_greedy_and_those_of_each_recording_alone(tmp_path: Path) -> None:
    module = save(tmp_path, "whisper")
    _, data = loaded(tmp_path, batch_size=8)
    (batch,) = data.batches
    found = data.evaluate.inputs.transcribe(module, batch)
    tokens = zoo.tokenizer()
    for place, text in enumerate(found):
        ids = [2]
        while len(ids) < WHISPER["max_target_positions"] and ids[-1] != 3:
            with torch.no_grad():
                features = batch["input_features"][place : place + 1]
                ids.append(int(module(features, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokens.decode(ids, skip_special_tokens=True)


def test_a_language_is_part_of_what_the_decoder_reads(tmp_path: Path) -> None:
    save(tmp_path, "whisper")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = sorted({letter for sentence in zoo.SENTENCES for letter in sentence.replace(" ", "Ġ")})
    vocab = {token: index for index, token in enumerate([*letters, *special])}
    end, start, english, task, untimed = (vocab[token] for token in special)
    prompt = [start, english, task, untimed]
    tokens = transformers.WhisperTokenizer(vocab=vocab, merges=[])
    tokens.save_pretrained(tmp_path / "model")
    ends = {"eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = transformers.WhisperConfig(**{**WHISPER, **ends, "bos_token_id": end, "vocab_size": len(vocab)})
    module: Any = zoo.randomised(transformers.WhisperForConditionalGeneration(config), 0)
    module.generation_config = transformers.GenerationConfig(
        **ends,
        max_length=20,  # of what follows the prompt
        is_multilingual=True,
        lang_to_id={"<|en|>": english},
        task_to_id={"transcribe": task},
        no_timestamps_token_id=untimed,
    )
    module.tie_weights()
    module.save_pretrained(tmp_path / "model")
    model, data = loaded(tmp_path, language="en", batch_size=8)
    (batch,) = data.batches
    assert (batch["decoder_input_ids"][:, :4] == torch.tensor(prompt)).all()
    found = data.evaluate.inputs.transcribe(model.module, batch)
    for place, text in enumerate(found):
        ids = list(prompt)
        while len(ids) < 24 and (len(ids) == 4 or ids[-1] != end):
            with torch.no_grad():
                features = batch["input_features"][place : place + 1]
                ids.append(int(model.module(features, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokens.decode(ids[4:], skip_special_tokens=True)
    with pytest.raises(ModelError, match="language 'klingon': "):
        loaded(tmp_path, language="klingon")
    _, other = loaded(tmp_path, batch_size=8)
    assert other.key != data.key


def test_word_errors_are_those_of_all_recordings(tmp_path: Path) -> None:
    """Transcripts of what the model hears, written otherwise, with two words more and with the silent ones wrong."""
    module = save(tmp_path, "hubert")
    _, data = loaded(tmp_path)
    heard = [text for batch in data.batches for text in data.evaluate.inputs.transcribe(module, batch)]
    order = sorted(range(len(SECONDS)), key=lambda index: (int(SECONDS[index] * RATE), index))
    texts = [text.upper() + "." if spoken_words(text) else "silence" for text in heard]
    texts[2] += " Two, more!"
    rows = [f"{index}.wav\t{text}" for index, text in zip(order, texts, strict=True)]
    (tmp_path / "heard/other.tsv").write_text("\n".join(["file\ttext", *rows]))
    _, data = loaded(tmp_path, path="heard/other.tsv")
    silent = sum(not spoken_words(text) for text in heard)
    assert silent < len(heard)
    assert data.evaluate(module) == {"wer": (2 + silent) / sum(len(spoken_words(text)) for text in texts)}
    torchmetrics = pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    _, data = loaded(tmp_path, path="heard/other.tsv", metric="torchmetrics:CharErrorRate")
    as_written = float(torchmetrics.text.CharErrorRate()(heard, texts))
    assert data.evaluate(module) == {"CharErrorRate": pytest.approx(as_written)}


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_frames_become_letters(kind: str, tmp_path: Path) -> None:
    """Repeated letters are one, and the padding token is none."""
    module = save(tmp_path, kind)
    _, data = loaded(tmp_path)
    letters = ["", "", "", "", " ", *"abcdefghijklmnopqrstuvwxy"]
    special = {1: "<s>", 2: "</s>", 3: "<unk>"}
    for batch in data.batches:
        found = data.evaluate.inputs.transcribe(module, batch)
        for place, text in enumerate(found):
            mask = batch.get("attention_mask")
            count = batch["input_values"].shape[1] if mask is None else int(mask[place].sum())
            one = {name: value[place : place + 1, :count] for name, value in batch.items()}
            with torch.no_grad():
                best = module(**one).logits[0].argmax(-1).tolist()
            kept = [best[0], *(after for before, after in pairwise(best) if after != before)]
            assert text.strip() == "".join(special.get(index, letters[index]) for index in kept).strip()


# -- data --------------------------------------------------------------------------------------------------------------


def test_models_without_a_mask_get_recordings_of_one_length(tmp_path: Path) -> None:
    save(tmp_path, "hubert")
    model, data = loaded(tmp_path)
    assert data.samples == len(SECONDS)
    sizes = [batch["input_values"].shape for batch in data.batches]
    assert sum(rows for rows, _ in sizes) == len(SECONDS)
    assert {count for _, count in sizes} == {int(seconds * RATE) for seconds in SECONDS}
    assert [rows for rows, count in sizes if count == int(0.05 * RATE)] == [2]
    assert all(set(batch) == {"input_values"} for batch in data.batches)
    assert FAMILIES[model.family].preprocess(model.architecture)["inputs"] == ["input_values"]


@pytest.mark.parametrize("kind", MODELS)
def test_example_inputs_are_those_of_recordings(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model, data = loaded(tmp_path)
    family = FAMILIES[model.family]
    described = family.preprocess(model.architecture)
    batch = family.example_input(model.architecture, samples=2)
    assert described["kind"] == "audio"
    assert list(batch) == described["inputs"] == list(data.batches[0])
    assert {name: value.dtype for name, value in batch.items()} == {
        name: value.dtype for name, value in data.batches[0].items()
    }
    assert model.outputs(model.module, batch).isfinite().all()
    assert data.evaluate(model.module)["wer"] > 0


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ("gone.wav\tthe dog", {}, "recording gone.wav does not exist in"),
        ("none.wav\tthe dog", {}, "recording none.wav is empty"),
        ("text.wav\tthe dog", {}, "recording text.wav, which is not WAV,|recording text.wav cannot be read"),
        ("long.wav\tthe dog", {}, r"recording long.wav takes 1.2 s, but the model hears 1 s: cut it"),
        ("0.wav\t ", {}, r"all.tsv, row 10, column 'text': the transcript is missing"),
        ("\tthe dog", {}, r"all.tsv, row 10, column 'file': the recording's file is missing"),
        ("0.wav\tthe dog", {"metric": "accuracy"}, "metric 'accuracy' does not fit speech; choose wer"),
        ("0.wav\t...", {"list": "last.txt"}, "the transcripts have no words"),
    ],
)
def test_data_at_fault_is_named(row: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, "whisper")
    heard = tmp_path / "heard"
    with (heard / "all.tsv").open("a") as file:
        file.write(f"\n{row}")
    (heard / "none.wav").write_bytes(b"")
    (heard / "text.wav").write_text("not a recording")
    (heard / "long.wav").write_bytes(wav(tone(1.2, 8000), 8000))
    (tmp_path / "last.txt").write_text("10\n")
    with pytest.raises(DataError, match=message) as caught:
        loaded(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_calibration_recordings_are_cut_at_what_the_model_hears(tmp_path: Path) -> None:
    save(tmp_path, "whisper")
    (tmp_path / "heard/0.wav").write_bytes(wav(tone(1.2, RATE), RATE))
    values = run_of()
    del values["data"]["calibration"]["samples"]
    _, data = calibration(tmp_path, values)
    assert data.samples == len(SECONDS)


def test_models_and_settings_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save(tmp_path, "whisper")
    with pytest.raises(ConfigError, match="label: source audio needs the column of transcripts"):
        loaded(tmp_path, label=None)
    with pytest.raises(ModelError, match="does not take a language: leave out language"):
        loaded(tmp_path, language="en")
    values = run_of()
    values["model"]["task"] = "text2text-generation"
    config = RunConfig.from_mapping({"budget": "4bit", **values}, str(tmp_path))
    with pytest.raises(DataError, match=f"source audio is for models of family transformers with task {TASK}"):
        load_dataset(config.data.evaluation, "evaluation", None, config.model, str(tmp_path), 0)


def test_the_root_is_where_recordings_are(tmp_path: Path) -> None:
    save(tmp_path, "hubert")
    (tmp_path / "heard/all.tsv").rename(tmp_path / "all.tsv")
    _, data = loaded(tmp_path, path="all.tsv", root="heard")
    assert data.samples == len(SECONDS)
    with pytest.raises(DataError, match=r"recording 0\.wav does not exist in"):
        loaded(tmp_path, path="all.tsv")
