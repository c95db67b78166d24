"""Classifiers of recordings: AST, wav2vec 2.0, HuBERT and Whisper. Batches, classes, accuracy, exports."""

from __future__ import annotations

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
from mlorq.errors import ConfigError, DataError, ModelError
from mlorq.models import FAMILIES, FloatModel, load_model, rebuild
from mlorq.models.computed_weights import merge_computed_weights
from mlorq.models.layers import find_layers
from mlorq.models.left_float import NO_GRADIENT
from mlorq.models.speech_outputs import frame_mask
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.data.test_recordings import tone, wav
from tests.long import few
from tests.models.test_speech import CTC, MASKED, RATE, SECONDS, WHISPER
from tests.models.test_transformers_tasks import dataset

TASK = "audio-classification"
NAMES = ["dog", "cat", "bird", "rain"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
AST = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
    "frequency_stride": 4,
    "time_stride": 4,
    "max_length": 12,
    "num_mel_bins": 16,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ast": ("ASTConfig", "ASTForAudioClassification", AST),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", {**CTC, **MASKED, "classifier_proj_size": 8}),
    "hubert": ("HubertConfig", "HubertForSequenceClassification", {**CTC, "classifier_proj_size": 8}),
    "whisper": ("WhisperConfig", "WhisperForAudioClassification", {**WHISPER, "classifier_proj_size": 8}),
}


def extractor(kind: str) -> Any:
    if kind == "ast":
        return transformers.ASTFeatureExtractor(max_length=AST["max_length"], num_mel_bins=AST["num_mel_bins"])
    if kind == "whisper":
        return transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=kind == "wav2vec2")


def save(folder: Path, kind: str) -> nn.Module:
    """A model with its feature extractor, and recordings of tones with classes beside it."""
    config, name, settings = MODELS[kind]
    built = getattr(transformers, config)(**settings, **LABELS)
    module: Any = zoo.randomised(getattr(transformers, name)(built), 0)
    module.save_pretrained(folder / "model")
    extractor(kind).save_pretrained(folder / "model")
    (folder / "heard").mkdir()
    lines = ["file\tclass"]
    for index, seconds in enumerate(SECONDS):
        (folder / f"heard/{index}.wav").write_bytes(wav(tone(seconds, RATE, 300.0 + 200 * index), RATE))
        # By name or by number.
        lines.append(f"{index}.wav\t{NAMES[index % 4] if index < 6 else index % 4}")
    (folder / "heard/all.tsv").write_text("\n".join(lines))
    return module


def values(**evaluation: Any) -> dict[str, Any]:
    heard = {"source": "audio", "path": "heard/all.tsv", "audio": "file", "label": "class", "batch_size": 3}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": heard | {"samples": 6}, "evaluation": heard | evaluation},
    }


def loaded(folder: Path) -> FloatModel:
    return load_model(RunConfig.from_mapping({"budget": "4bit", **values()}, str(folder)).model, str(folder))


def sorted_indices() -> list[int]:
    return sorted(range(len(SECONDS)), key=lambda index: (int(SECONDS[index] * RATE), index))


# -- data and metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_classes_are_those_of_each_recording_alone(kind: str, tmp_path: Path) -> None:
    """Padding of a batch does not change a recording's logits; accuracy counts the classes of the table."""
    module: Any = save(tmp_path, kind)
    model, data = loaded(tmp_path), dataset(tmp_path, values())
    with torch.no_grad():
        outputs = torch.cat([model.outputs(model.module, batch) for batch in data.batches])
    own, hits = extractor(kind), 0
    for index, found in zip(sorted_indices(), outputs, strict=True):
        heard = tone(SECONDS[index], RATE, 300.0 + 200 * index)
        heard = np.round(heard * 32767) / 32768 if np.abs(heard).max() <= 1 else heard
        with torch.no_grad():
            alone = module(**own(heard.astype(np.float32), sampling_rate=RATE, return_tensors="pt")).logits[0]
        assert torch.allclose(found, alone, atol=2e-3)
        hits += int(found.argmax()) == index % 4
    assert data.metric_name == "accuracy"
    assert data.metric(outputs)["accuracy"] == hits / len(SECONDS)
    sizes = [len(next(iter(batch.values()))) for batch in data.batches]
    assert sum(sizes) == len(SECONDS)
    assert (sizes == [3, 3, 2]) == (kind != "hubert"), "a model without a mask gets recordings of one length"


def test_calibration_has_the_classes_of_its_samples(tmp_path: Path) -> None:
    save(tmp_path, "ast")
    whole = values()
    del whole["data"]["calibration"]["samples"]
    data = dataset(tmp_path, whole, "calibration")
    assert torch.cat(list(data.labels)).tolist() == [index % 4 for index in sorted_indices()]
    del whole["data"]["calibration"]["label"]
    other = dataset(tmp_path, whole, "calibration")
    assert other.labels is None
    assert other.key == data.key


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ("0.wav\tlion", {}, "row 10, column 'class': 'lion' is none of the model's classes: dog, cat, bird, rain$"),
        ("0.wav\t7", {}, "row 10, column 'class': label 7 is out of range: the model has 4 classes$"),
        ("0.wav\t ", {}, "row 10, column 'class': the class is missing"),
        ("short.wav\tdog", {}, r"recording short.wav of 0.001 s cannot be prepared: "),
        ("0.wav\tdog", {"metric": "wer"}, "metric 'wer' does not fit classes of recordings; choose accuracy"),
        ("0.wav\tdog", {"language": "en"}, "language is for task automatic-speech-recognition: leave it out"),
    ],
)
def test_data_at_fault_is_named(row: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, "ast")
    with (tmp_path / "heard/all.tsv").open("a") as file:
        file.write(f"\n{row}")
    (tmp_path / "heard/short.wav").write_bytes(wav(tone(0.001, RATE), RATE))
    with pytest.raises(DataError, match=message) as caught:
        dataset(tmp_path, values(**settings))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    save(tmp_path, "ast")
    with pytest.raises(ConfigError, match="needs the column of transcripts or classes in evaluation data"):
        dataset(tmp_path, values(label=None))
    (tmp_path / "model/preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"model './model': its feature extractor cannot be loaded: "):
        dataset(tmp_path, values())


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_classifiers_are_loaded_and_rebuilt(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model = loaded(tmp_path)
    batch = dataset(tmp_path, values(), "calibration").batches[0]
    again = rebuild(model.architecture)
    merge_computed_weights(again)  # as the loaded model's are
    again.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        assert torch.allclose(model.outputs(again.eval(), batch), model.outputs(model.module, batch), atol=1e-6)
    layers = find_layers(model, batch)
    assert len(layers.layers) > 5
    assert not [row.name for row in layers.skipped if row.reason == NO_GRADIENT]


def test_padding_is_left_out_of_statistics(tmp_path: Path) -> None:
    save(tmp_path, "wav2vec2")
    model, data = loaded(tmp_path), dataset(tmp_path, values(batch_size=8))
    (batch,) = data.batches
    counts = batch["attention_mask"].sum(1).tolist()
    alone = [{name: value[i : i + 1, :count] for name, value in batch.items()} for i, count in enumerate(counts)]
    mask = frame_mask(model.module, batch)
    assert not mask.all()
    assert torch.equal(model.token_mask(batch)[0], mask)
    layers = [layer for layer in find_layers(model, batch).layers if "encoder.layers" in layer.name]
    found, wanted = (capture(model, layers, batches, moments=True) for batches in ([batch], alone))
    for name, products in found.inputs.items():
        assert products.counts == wanted.inputs[name].counts
        torch.testing.assert_close(products.means(), wanted.inputs[name].means(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", few(["ast", "wav2vec2"], "ast"))
def test_a_classifier_is_compressed_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    module = save(tmp_path, kind)
    result = zoo.run(
        tmp_path, {**values(), "search": {**zoo.FAST, "include": ["*layers.0*", "classifier*"]}, "budget": "6bit"}
    )
    assert result["metric"]["name"] == "accuracy"
    location = result["checkpoint"].removeprefix("file://")
    found, again = mlorq.load(location), mlorq.load(location, weights="both")
    assert type(found) is type(module)
    data = dataset(tmp_path, values())
    with torch.no_grad():
        outputs = torch.cat([found(**batch).logits for batch in data.batches])
        assert torch.equal(outputs, torch.cat([again(**batch).logits for batch in data.batches]))
    assert data.metric(outputs)["accuracy"] == result["metric"]["compressed"]
    assert (Path(location) / "preparation/preprocessor_config.json").is_file()


@pytest.mark.parametrize("kind", MODELS)
def test_example_inputs_are_those_of_recordings(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model, data = loaded(tmp_path), dataset(tmp_path, values())
    family = FAMILIES[model.family]
    described = family.preprocess(model.architecture)
    batch = family.example_input(model.architecture, samples=2)
    assert described["kind"] == "audio"
    assert list(batch) == described["inputs"] == list(data.batches[0])
    for name, value in batch.items():
        assert value.dtype == data.batches[0][name].dtype
        assert value.dim() == data.batches[0][name].dim()
    assert model.outputs(model.module, batch).shape == (2, 4)
    assert family.classes(model) == 4


@pytest.mark.parametrize("kind", few(list(MODELS)))
def test_graphs_of_classifiers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    save(tmp_path, kind)
    model = loaded(tmp_path)
    module = compressed(model.module)
    (file,) = mlorq.export(folder_of(tmp_path / "out", module, model.architecture), tmp_path / "model.onnx")
    graph = mlorq.load(file, runtime="onnxruntime")
    for batch in dataset(tmp_path, values()).batches:
        with torch.no_grad():
            wanted = module(**batch).logits
        assert float((graph(**batch).logits - wanted).abs().max() / wanted.abs().max()) < 1e-4
