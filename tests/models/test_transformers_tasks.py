"""Tasks of transformers beside texts and detection: classifiers and encoders of images, language models."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch import nn

import mlorq
from mlorq.config.run import RunConfig
from mlorq.data import load_dataset
from mlorq.data.language import MASKED
from mlorq.errors import ConfigError, DataError
from mlorq.models import load_model
from mlorq.models.task_outputs import DIRECTIONS, POSITIONS, image_features, sketched_logits
from mlorq.models.tasks import TASKS
from tests import zoo

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8, **SMALL}
TEXT = "\n".join(zoo.SENTENCES * 12)


def save_images(folder: Path, kind: str, config: Any) -> nn.Module:
    """A model of images with its image processor, in a folder."""
    module = zoo.randomised(getattr(transformers, kind)(config), 0)
    module.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    for index in range(12):
        zoo.save_image(folder.parent / f"images/{index % 3}/{index}.png", index, 24)
    return module


def save_language(folder: Path, kind: str) -> nn.Module:
    """A language model with its tokenizer, and a file of text beside it."""
    if kind == "next":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
        module = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, **sizes))
    else:
        settings = {"max_position_embeddings": 40, **SMALL}
        module = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=24, **settings))
    zoo.randomised(module, 0)
    module.tie_weights()
    module.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return module


def image_run(task: str) -> dict[str, Any]:
    images = {"source": "image_folder", "root": "images/", "batch_size": 5}
    return {
        "model": {"family": "transformers", "name": "./model", "task": task},
        "data": {"calibration": images, "evaluation": images},
    }


def language_run(task: str, **settings: Any) -> dict[str, Any]:
    text = {"source": "text_file", "path": "text.txt", "max_length": 12, "batch_size": 5, **settings}
    return {
        "model": {"family": "transformers", "name": "./model", "task": task},
        "data": {"calibration": text | {"samples": 8}, "evaluation": text},
    }


def dataset(folder: Path, values: dict[str, Any], role: str = "evaluation") -> Any:
    config = RunConfig.from_mapping({"budget": "4bit", **values}, str(folder))
    model = load_model(config.model, str(folder))
    return load_dataset(getattr(config.data, role), role, model, config.model, str(folder), 0)


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_classifier_of_images_is_compressed_and_loads_alone(tmp_path: Path) -> None:
    module = save_images(tmp_path / "model", "ViTForImageClassification", transformers.ViTConfig(num_labels=3, **IMAGE))
    result = zoo.run(tmp_path, image_run("image-classification"))
    assert result["metric"]["name"] == "accuracy"
    batch = dataset(tmp_path, image_run("image-classification")).batches[0]
    assert set(batch) == {"pixel_values"}
    loaded = mlorq.load(result["checkpoint"].removeprefix("file://"))
    with torch.no_grad():
        expected, found = module(**batch).logits, loaded(**batch).logits
    error = float((found - expected).square().sum() / expected.square().sum())
    assert 0 < error < 0.05
    assert [row["name"] for row in result["left_float"]] == ["vit.embeddings.position_embeddings"]
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    values = image_run("image-classification")
    named = {"metric": "torchmetrics:Accuracy", "metric_arguments": {"task": "multiclass", "num_classes": 3}}
    values["data"]["evaluation"] = values["data"]["evaluation"] | named
    data = dataset(tmp_path, values)
    with torch.no_grad():
        outputs = torch.cat([module(**one).logits for one in data.batches])
    assert data.metric(outputs) == {"Accuracy": pytest.approx(result["metric"]["float"])}


def test_features_of_images_are_measured_by_their_neighbours(tmp_path: Path) -> None:
    save_images(tmp_path / "model", "Dinov2Model", transformers.Dinov2Config(mlp_ratio=2, **IMAGE))
    result = zoo.run(tmp_path, image_run("image-feature-extraction"))
    assert result["metric"]["name"] == "knn"
    assert 0 <= result["metric"]["compressed"] <= 1


@pytest.mark.parametrize(("task", "kind"), [("text-generation", "next"), ("fill-mask", "masked")])
def test_language_models_are_measured_by_their_perplexity(task: str, kind: str, tmp_path: Path) -> None:
    module = save_language(tmp_path / "model", kind)
    result = zoo.run(tmp_path, {**language_run(task), "budget": "6bit"})
    assert result["metric"]["name"] == "perplexity"
    assert result["metric"]["float"] == pytest.approx(_perplexity(module, dataset(tmp_path, language_run(task)), kind))
    assert result["metric"]["compressed"] == pytest.approx(result["metric"]["float"], rel=0.2)
    loaded = mlorq.load(result["checkpoint"].removeprefix("file://"))
    assert type(loaded).__name__ == type(module).__name__


def _perplexity(module: nn.Module, data: Any, kind: str) -> float:
    """From the probabilities of one text after the other."""
    labels = torch.cat(list(data.evaluate.labels))
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    logs = []
    for row, wanted in zip(ids, labels, strict=True):
        with torch.no_grad():
            probabilities = module(input_ids=row[None]).logits[0].double().softmax(-1)
        for place in range(len(row)):
            if kind == "next" and place:
                logs.append(math.log(probabilities[place - 1, row[place]]))
            elif kind == "masked" and wanted[place] != -100:
                logs.append(math.log(probabilities[place, wanted[place]]))
    return math.exp(-np.mean(logs))


# -- f(x) --------------------------------------------------------------------------------------------------------------


def test_a_sketch_has_the_distances_of_the_logits(seed: int) -> None:
    class Words(nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.values = logits

        def forward(self, input_ids: torch.Tensor) -> Any:
            return transformers.modeling_outputs.MaskedLMOutput(logits=self.values)

    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(6, POSITIONS, 3000, generator=generator)
    second = first + 0.1 * torch.randn(first.shape, generator=generator) + 5.0  # a constant, which means nothing
    batch = {"input_ids": torch.zeros(6, POSITIONS, dtype=torch.int64)}
    a, b = (sketched_logits(Words(values), batch) for values in (first, second))
    assert a.shape == (6, POSITIONS * DIRECTIONS)
    centred = [values - values.mean(-1, keepdim=True) for values in (first, second)]
    exact = float((centred[0] - centred[1]).square().sum() / centred[0].square().sum())
    assert float((a - b).square().sum() / a.square().sum()) == pytest.approx(exact, rel=0.05)


def test_a_causal_model_computes_the_chosen_logits_alone(tmp_path: Path) -> None:
    module = save_language(tmp_path / "model", "next")
    ids = torch.randint(5, 20, (3, 33), generator=torch.Generator().manual_seed(1))
    places = torch.linspace(0, 32, POSITIONS).round().long()
    with torch.no_grad():
        whole = module(input_ids=ids).logits[:, places]
        found = sketched_logits(module, {"input_ids": ids})
    assert torch.allclose(found, (whole - whole.mean(-1, keepdim=True)).flatten(1), atol=1e-5)


def test_two_towers_give_the_image_s_embedding() -> None:
    text = {"vocab_size": 24, "max_position_embeddings": 8, **SMALL}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=6)
    module = zoo.randomised(transformers.CLIPModel(config), 0)
    pixels = zoo.pixels(3, 0, 16)
    with torch.no_grad():
        found = image_features(module, {"pixel_values": pixels})
        expected = module.visual_projection(module.vision_model(pixel_values=pixels).pooler_output)
    assert torch.allclose(found, expected)


# -- data --------------------------------------------------------------------------------------------------------------


def test_pieces_of_text_are_whole_and_in_order(tmp_path: Path) -> None:
    save_language(tmp_path / "model", "next")
    data = dataset(tmp_path, language_run("text-generation"))
    ids = torch.cat([batch["input_ids"] for batch in data.batches]).flatten()
    tokens = zoo.tokenizer()
    expected = [*tokens(TEXT, add_special_tokens=False)["input_ids"], tokens.sep_token_id]
    assert ids.tolist() == expected[: len(ids)]
    assert len(expected) - len(ids) < 12
    assert data.samples == len(ids) // 12
    calibration = dataset(tmp_path, language_run("text-generation"), "calibration")
    assert calibration.samples == 8
    assert {tuple(row.tolist()) for batch in calibration.batches for row in batch["input_ids"]} <= {
        tuple(row.tolist()) for batch in data.batches for row in batch["input_ids"]
    }


def test_masked_tokens_are_a_share_of_the_ordinary_ones(tmp_path: Path) -> None:
    save_language(tmp_path / "model", "masked")
    data = dataset(tmp_path, language_run("fill-mask"))
    tokens = zoo.tokenizer()
    for batch, labels in zip(data.batches, data.evaluate.labels, strict=True):
        ids = batch["input_ids"]
        assert ids.shape[1] == 12
        assert (ids[:, 0] == tokens.cls_token_id).all()
        assert (ids[:, -1] == tokens.sep_token_id).all()
        hidden = ids == tokens.mask_token_id
        assert ((labels != -100) == hidden).all()
        ordinary = (labels == -100) & (ids > 4)
        assert (hidden.sum(1) == ((ordinary | hidden).sum(1) * MASKED).ceil()).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nothing.txt"}, "nothing.txt does not exist"),
        ({"path": "short.txt"}, "has 4 tokens, fewer than one piece of 12: set max_length lower"),
        ({"path": "bytes.txt"}, "is not UTF-8"),
        ({"metric": "accuracy"}, "metric 'accuracy' does not fit a language model; choose perplexity"),
        ({"path": "none-*.txt"}, "there are no files"),
    ],
)
def test_text_at_fault_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_language(tmp_path / "model", "next")
    (tmp_path / "short.txt").write_text("the dog runs")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=message) as caught:
        dataset(tmp_path, language_run("text-generation", **settings))
    assert "\n" not in str(caught.value)


def test_models_and_sources_that_do_not_fit_are_named(tmp_path: Path) -> None:
    zoo.save_text_model(tmp_path / "model", "bert-classifier")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(DataError, match="source text_file is for models with task text-generation or fill-mask"):
        dataset(tmp_path, language_run("text-classification"))
    with pytest.raises(DataError, match="source image_folder is for models of family timm, or family transf"):
        dataset(tmp_path, image_run("text-classification"))
    with pytest.raises(ConfigError, match="needs task: text-classification, sentence-similarity, token-classification"):
        dataset(tmp_path, {**language_run("fill-mask"), "model": {"family": "transformers", "name": "./model"}})


def test_features_have_no_accuracy(tmp_path: Path) -> None:
    save_images(tmp_path / "model", "Dinov2Model", transformers.Dinov2Config(mlp_ratio=2, **IMAGE))
    values = image_run("image-feature-extraction")
    values["data"]["evaluation"] = values["data"]["evaluation"] | {"metric": "accuracy"}
    with pytest.raises(DataError, match="metric 'accuracy' does not fit features; choose knn"):
        dataset(tmp_path, values)


def test_timm_models_without_their_classifier(tmp_path: Path) -> None:
    whole = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS)
    torch.save(whole.state_dict(), tmp_path / "vit.pt")
    model = {
        "family": "timm",
        "name": zoo.VIT,
        "arguments": zoo.VIT_ARGUMENTS,
        "checkpoint": "vit.pt",
        "features": True,
    }
    images = {"source": "image_folder", "root": "images/"}
    for index in range(9):
        zoo.save_image(tmp_path / f"images/{index % 3}/{index}.png", index, 24)
    values = {"model": model, "data": {"calibration": images, "evaluation": images}}
    result = zoo.run(tmp_path, values)
    assert result["metric"]["name"] == "knn"
    config = RunConfig.from_mapping({"budget": "4bit", **values}, str(tmp_path))
    found = load_model(config.model, str(tmp_path))
    pixels = zoo.pixels(2, 3)
    with torch.no_grad():
        assert torch.equal(found.module(pixels), whole.forward_head(whole.forward_features(pixels), pre_logits=True))
    description = json.loads((Path(result["checkpoint"].removeprefix("file://")) / "mlorq.json").read_text())
    assert description["architecture"]["arguments"]["num_classes"] == 0
    assert mlorq.load(result["checkpoint"].removeprefix("file://"))(pixels).shape == (2, 32)


def test_every_task_names_a_class_of_transformers_and_has_its_outputs() -> None:
    for task in TASKS.values():
        assert hasattr(transformers, task.auto), task
        assert not task.other_auto or hasattr(transformers, task.other_auto), task
        assert task.token_mask() is None or callable(task.token_mask())
        assert task.name == "sentence-similarity" or callable(task.forward())


def test_the_configurations_of_the_page_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "MODELS.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    tasks = [RunConfig.from_mapping(yaml.safe_load(block), "/anywhere").model.own for block in blocks]
    assert [getattr(own, "task", None) or own.features for own in tasks] == [
        "text-generation",
        "token-classification",
        "text-generation",
        "multiple-choice",
        "text2text-generation",
        "sentence-similarity",
        "automatic-speech-recognition",
        "audio-classification",
        True,
        "semantic-segmentation",
        "depth-estimation",
        "zero-shot-image-classification",
        "mask-generation",
        "text-classification",
    ]
    assert all(f"| `{name}` | `{task.auto}`" in page for name, task in TASKS.items())


def test_graphs_of_language_models_return_no_cache(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra onnx")
    from mlorq.export_targets.onnx_graph.float_graph import float_twin

    module = save_language(tmp_path / "model", "next")
    ids = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    twin, _ = float_twin(module)
    with torch.no_grad():
        found, whole = twin(input_ids=ids), module(input_ids=ids)
    assert found.past_key_values is None
    assert whole.past_key_values is not None, "the model itself stays as it was"
    assert torch.equal(found.logits, whole.logits)
