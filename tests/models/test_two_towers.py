"""Models of images and texts: embeddings of both towers, zero-shot classification, recall, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn

import mlorq
from mlorq.checkpoint.io import inspect
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, DataError, ModelError
from mlorq.models import FAMILIES, load_model
from mlorq.models.two_towers import IMAGE_INPUTS, embeddings
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.long import few
from tests.models.test_transformers_tasks import IMAGE, SMALL, dataset

TASK = "zero-shot-image-classification"
TEXT = {"vocab_size": 24, "max_position_embeddings": 12, "eos_token_id": 3, "pad_token_id": 0, **SMALL}
NAMES = ("big_bird", "cat", "dog")
CAPTIONS = ["the dog runs", "a cat", "the bird sings", "a big dog sleeps", "cats run slow", "a cat", "the red bird"]


def clip(seed: int = 0) -> nn.Module:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=6)
    return zoo.randomised(transformers.CLIPModel(config), seed)


def siglip(seed: int = 0) -> nn.Module:
    config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=IMAGE)
    return zoo.randomised(transformers.SiglipModel(config), seed)


def siglip2(seed: int = 0) -> nn.Module:
    patches = {"num_patches": 16, "patch_size": 8, **SMALL}
    config = transformers.Siglip2Config(text_config=TEXT | {"projection_size": 16}, vision_config=patches)
    return zoo.randomised(transformers.Siglip2Model(config), seed)


MODELS = {"clip": clip, "siglip": siglip, "siglip2": siglip2}


def save(folder: Path, kind: str) -> nn.Module:
    """A model with its processors; nine images in folders of classes, and a table of captions."""
    module = MODELS[kind]()
    module.save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    processor: Any = transformers.ViTImageProcessor(size=size)
    if kind == "siglip2":
        processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    processor.save_pretrained(folder / "model")
    for index in range(9):
        zoo.save_image(folder / f"images/{NAMES[index % 3]}/{index}.png", index, 24)
    rows = [f"{NAMES[index % 3]}/{index}.png,{caption}" for index, caption in enumerate(CAPTIONS)]
    rows.append(f"{NAMES[0]}/0.png,a slow bird")
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    return module


def classes(**settings: Any) -> dict[str, Any]:
    images = {"source": "image_folder", "root": "images/", "batch_size": 4, **settings}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": images, "evaluation": images},
    }


def captions(**settings: Any) -> dict[str, Any]:
    table = {"source": "captions", "root": "images/", "path": "captions.csv", "text": ["caption"], "batch_size": 3}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": table | settings, "evaluation": table | settings},
    }


def refusal(folder: Path, values: dict[str, Any]) -> str:
    with pytest.raises((DataError, ModelError, ConfigError)) as caught:
        dataset(folder, values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- f(x) --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(MODELS))
def test_outputs_are_the_embeddings_of_both_towers(kind: str, tmp_path: Path) -> None:
    module = save(tmp_path, kind)
    batch = dataset(tmp_path, captions()).batches[0]
    with torch.no_grad():
        whole = module(**batch)
        found = embeddings(module, batch)
    expected = torch.cat([F.normalize(whole.image_embeds, dim=1), F.normalize(whole.text_embeds, dim=1)], dim=1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.shape[0] == 3


def test_models_with_one_tower_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    zoo.save_text_model(tmp_path / "model", "bert")
    assert "model './model' is of type bert, which has no towers of images and of texts" in refusal(tmp_path, classes())


# -- data --------------------------------------------------------------------------------------------------------------


def test_texts_of_images_are_the_prompts_of_their_classes(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    data = dataset(tmp_path, classes(prompts=["the {} sleeps", "{}"]), "calibration")
    ids = [row.tolist() for batch in data.batches for row in batch["input_ids"]]
    prompts = [f"the {name} sleeps" for name in ("big bird", "cat", "dog") for _ in range(3)]
    tokens = zoo.tokenizer()(prompts)["input_ids"]
    assert [[token for token in row if token] for row in ids] == tokens
    assert set(data.batches[0]) == {"pixel_values", "input_ids", "attention_mask"}
    assert data.metric is None
    assert data.evaluate is None


@pytest.mark.parametrize(("kind", "length"), [("clip", 6), ("siglip", 12), ("siglip2", 12)])
def test_siglip_reads_texts_of_full_length(kind: str, length: int, tmp_path: Path) -> None:
    save(tmp_path, kind)
    lengths = {batch["input_ids"].shape[1] for batch in dataset(tmp_path, captions()).batches}
    assert max(lengths) == length


def test_long_texts_are_truncated(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    batch = dataset(tmp_path, classes(prompts=["{} " + "runs " * 30])).batches[0]
    assert batch["input_ids"].shape[1] == TEXT["max_position_embeddings"]


def test_zero_shot_accuracy_is_that_of_each_image_alone(tmp_path: Path) -> None:
    module = save(tmp_path, "clip")
    prompts = ["the {}", "a {} on the mat", "{} runs"]
    data = dataset(tmp_path, classes(prompts=prompts))
    tokenizer = zoo.tokenizer()
    hits = 0
    means = []
    for name in ("big bird", "cat", "dog"):
        total = torch.zeros(6)
        for prompt in prompts:
            found = tokenizer(prompt.format(name), return_tensors="pt")
            with torch.no_grad():
                total += F.normalize(
                    module.get_text_features(found["input_ids"], found["attention_mask"]).pooler_output[0], dim=0
                )
        means.append(F.normalize(total, dim=0))
    for batch in data.batches:
        for pixels in batch["pixel_values"]:
            with torch.no_grad():
                image = F.normalize(module.get_image_features(pixels[None]).pooler_output[0], dim=0)
            cosines = [float(image @ mean) for mean in means]
            hits += cosines.index(max(cosines)) == data.evaluate.labels[hits_place(data, pixels)]
    assert data.evaluate(module) == {"zero_shot": pytest.approx(hits / 9)}


def hits_place(data: Any, pixels: torch.Tensor) -> int:
    """The number of an image among all of a data set."""
    every = torch.cat([batch["pixel_values"] for batch in data.batches])
    return int((every == pixels).flatten(1).all(1).nonzero()[0])


def test_class_names_from_a_file(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    (tmp_path / "names.txt").write_text("bird\nred cat\ndog\n")
    (tmp_path / "labels.csv").write_text("file,label\nbig_bird/0.png,1\ncat/1.png,1\n")
    by_folder = dataset(tmp_path, classes(class_names="names.txt", prompts=["a {}"]))
    assert [int(ids) for ids in by_folder.batches[0]["input_ids"][0] if ids] == zoo.tokenizer()("a bird")["input_ids"]
    by_table = dataset(tmp_path, classes(class_names="names.txt", labels="labels.csv", prompts=["a {}"]))
    wanted = zoo.tokenizer()("a red cat")["input_ids"]
    assert by_table.batches[0]["input_ids"].tolist() == [wanted, wanted]
    assert by_folder.key != dataset(tmp_path, classes(prompts=["a {}"])).key


def test_classes_at_fault_are_named(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    (tmp_path / "names.txt").write_text("bird\ncat\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "labels.csv").write_text("file,label\ncat/1.png,2\n")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat/a.png")
    assert "2 names, but image folder" in refusal(tmp_path, classes(class_names="names.txt"))
    assert "names.txt are empty" not in refusal(tmp_path, classes(class_names="nothing.txt"))
    assert "empty.txt are empty" in refusal(tmp_path, classes(class_names="empty.txt"))
    text = refusal(tmp_path, classes(class_names="names.txt", labels="labels.csv"))
    assert "labels.csv, row 2: label 2 has no name: there are 2 class names" in text
    assert "the names of the classes are unknown: give class_names" in refusal(tmp_path, classes(labels="labels.csv"))
    assert "image a.png has no class" in refusal(tmp_path, classes(root="flat/", class_names="names.txt"))
    assert "metric 'accuracy' does not fit a model of two towers" in refusal(tmp_path, classes(metric="accuracy"))
    assert "prompts: 'a photo' has no {}" in refusal(tmp_path, classes(prompts=["a photo"]))


def test_recall_counts_images_and_texts_once(tmp_path: Path) -> None:
    module = save(tmp_path, "siglip")
    data = dataset(tmp_path, captions())
    model = load_model(RunConfig.from_mapping({"budget": "4bit", **captions()}, str(tmp_path)).model, str(tmp_path))
    with torch.no_grad():
        outputs = torch.cat([model.outputs(module, batch) for batch in data.batches])
    found = data.metric(outputs)
    rows = [line.split(",") for line in (tmp_path / "captions.csv").read_text().splitlines()[1:]]
    images, texts = sorted({file for file, _ in rows}), sorted({text for _, text in rows})
    assert len(images) == len(rows) - 1
    assert len(texts) == len(rows) - 1, "one image has two captions, two images have one"
    image = {file: outputs[index, :16] for index, (file, _) in enumerate(rows)}
    text = {words: outputs[index, 16:] for index, (_, words) in enumerate(rows)}
    there = [[file, max(texts, key=lambda words: float(image[file] @ text[words]))] in rows for file in images]
    back = [[max(images, key=lambda file: float(image[file] @ text[words])), words] in rows for words in texts]
    assert found["image_to_text"] == pytest.approx(np.mean(there))
    assert found["text_to_image"] == pytest.approx(np.mean(back))
    assert found["recall"] == pytest.approx((np.mean(there) + np.mean(back)) / 2)


def test_captions_at_fault_are_named(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    assert "source captions needs text" in refusal(tmp_path, captions(text=None))
    assert "text has 2 columns: captions are in one" in refusal(tmp_path, captions(text=["caption", "image"]))
    assert "has no column 'words'" in refusal(tmp_path, captions(text=["words"]))
    assert "metric 'knn' does not fit a model of two towers and images with captions; choose recall" in refusal(
        tmp_path, captions(metric="knn")
    )
    assert "nothing does not exist" in refusal(tmp_path, captions(root="nothing"))
    (tmp_path / "captions.csv").write_text("image,caption\ncat/1.png,a cat\n,a dog\n")
    assert "row 3, column 'image': the image file is missing" in refusal(tmp_path, captions())
    (tmp_path / "captions.csv").write_text("image,caption\ncat/nothing.png,a cat\n")
    assert "cat/nothing.png does not exist" in refusal(tmp_path, captions())
    config = transformers.ViTConfig(num_labels=3, **IMAGE)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    other = captions()
    other["model"]["task"] = "image-classification"
    assert "source captions is for models of family transformers with task zero-shot" in refusal(tmp_path, other)


def test_rows_of_captions_can_be_listed_and_drawn(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    (tmp_path / "rows.txt").write_text("5\n2\n")
    listed = dataset(tmp_path, captions(list="rows.txt"))
    assert listed.samples == 2
    wanted = zoo.tokenizer()([CAPTIONS[3], CAPTIONS[0]], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(listed.batches[0]["input_ids"], wanted)
    assert dataset(tmp_path, captions(samples=4)).samples == 4


# -- the token mask ----------------------------------------------------------------------------------------------------


def test_the_mask_is_that_of_texts_or_of_padded_patches(tmp_path: Path) -> None:
    for kind in ("clip", "siglip2"):
        folder = tmp_path / kind
        save(folder, kind)
        Image.open(folder / "images/cat/1.png").resize((24, 40)).save(folder / "images/cat/1.png")
        model = load_model(RunConfig.from_mapping({"budget": "4bit", **captions()}, str(folder)).model, str(folder))
        batch = dataset(folder, captions()).batches[1 if kind == "clip" else 0]
        name = "attention_mask" if kind == "clip" else "pixel_attention_mask"
        mask = model.token_mask(batch)
        assert torch.equal(mask, batch[name].bool())
        assert not mask.all()
    # Four patches and a class token: a text of five tokens would be taken for them.
    same = {"pixel_values": zoo.pixels(2, 0, 16), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    clip_model = load_model(
        RunConfig.from_mapping({"budget": "4bit", **captions()}, str(tmp_path / "clip")).model, str(tmp_path / "clip")
    )
    assert clip_model.token_mask(same) is None


# -- whole runs --------------------------------------------------------------------------------------------------------


RUNS = {"clip": (classes, "zero_shot"), "siglip": (captions, "recall"), "siglip2": (captions, "recall")}


@pytest.mark.parametrize("kind", few(RUNS, "clip"))
def test_both_towers_are_compressed_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    values, metric = RUNS[kind]
    save(tmp_path, kind)
    result = zoo.run(tmp_path, {**values(samples=6), "search": zoo.FAST, "budget": "6bit"})
    assert result["metric"]["name"] == metric
    location = result["checkpoint"].removeprefix("file://")
    assert {"text", "vision"} <= {row["layer"].split("_")[0] for row in inspect(location)["layers"]}
    loaded, again = mlorq.load(location), mlorq.load(location, weights="both")
    data = dataset(tmp_path, values(samples=6))
    with torch.no_grad():
        found, other = (torch.cat([embeddings(one, batch) for batch in data.batches]) for one in (loaded, again))
    assert torch.equal(found, other)
    measured = data.evaluate(loaded) if data.evaluate else data.metric(found)
    assert measured == result["metrics"]["compressed"]


@pytest.mark.parametrize("kind", few(MODELS, "clip"))
def test_graphs_of_both_towers_take_any_number_of_images_and_texts(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    save(tmp_path, kind)
    config = RunConfig.from_mapping({"budget": "4bit", **captions()}, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    folder_of(tmp_path / "out", compressed(model.module), model.architecture)
    batch = dataset(tmp_path, captions()).batches[1]
    with torch.no_grad():
        expected = mlorq.load(tmp_path / "out")(**batch)
    graph = mlorq.load(tmp_path / "out", runtime="onnxruntime", threads=1)
    for rows in (slice(0, 3), slice(0, 2)):  # as many images as texts, and fewer
        images = {name: batch[name][rows] for name in IMAGE_INPUTS if name in batch}
        found = graph(**batch | images)
        assert difference(found.image_embeds, expected.image_embeds[rows]) < 1e-5
        assert difference(found.text_embeds, expected.text_embeds) < 1e-5
        assert difference(found.logits_per_image, expected.logits_per_image[rows]) < 1e-5


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", list(MODELS))
def test_example_inputs_are_images_and_texts(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    config = RunConfig.from_mapping({"budget": "4bit", **captions()}, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    family = FAMILIES[model.family]
    batch = family.example_input(model.architecture, samples=2)
    data = dataset(tmp_path, captions()).batches[0]
    assert [(name, value.dim()) for name, value in batch.items()] == [(name, data[name].dim()) for name in batch]
    assert set(batch) == set(data)
    with torch.no_grad():
        assert model.outputs(model.module, batch).isfinite().all()
    described = family.preprocess(model.architecture)
    assert described["kind"] == "image and text"
    assert sorted(described["inputs"]) == sorted(batch)
    assert described["text_inputs"] == (["input_ids", "attention_mask"] if kind == "clip" else ["input_ids"])
    assert described["max_length"] == TEXT["max_position_embeddings"]
