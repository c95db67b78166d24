"""Segment Anything: f(x), masks of boxes and their IoU, whole runs with their checkpoints and graphs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import mlorq
from mlorq.config.run import RunConfig
from mlorq.data.coco_prompts import PROMPTS
from mlorq.data.metrics import iou
from mlorq.errors import DataError, ModelError
from mlorq.models import FAMILIES, FloatModel, load_model, rebuild
from mlorq.models.layers import find_layers
from mlorq.models.mask_generation import VALUES, prompted_outputs
from tests import detectors, zoo
from tests.compressed import compressed, folder_of
from tests.long import few
from tests.models.test_transformers_tasks import dataset

TASK = "mask-generation"
SIDE = 64
VISION = {
    "hidden_size": 16,
    "output_channels": 32,  # the decoder normalises a quarter of them: two channels would become signs
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 24,
    "num_pos_feats": 16,
}
PROMPT = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4, "image_embedding_size": 8}
DECODER = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
HIERA = {
    "hidden_size": 8,
    "num_attention_heads": 1,
    "image_size": [SIDE, SIDE],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 24, 32],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [8, 4, 4, 2],
    "window_positional_embedding_background_size": [4, 4],
    "global_attention_blocks": [3],
}


def sam() -> nn.Module:
    config = transformers.SamConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)
    return transformers.SamModel(config)


def sam_hq() -> nn.Module:
    decoder = {**DECODER, "vit_dim": VISION["hidden_size"]}
    config = transformers.SamHQConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=decoder)
    return transformers.SamHQModel(config)


def sam2() -> nn.Module:
    vision = {
        "backbone_config": {"model_type": "sam2_hiera_det_model", **HIERA},
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    }
    prompt = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    return transformers.Sam2Model(config)


MODELS = {"sam": sam, "sam_hq": sam_hq, "sam2": sam2}


def processor(kind: str) -> Any:
    if kind == "sam2":
        images = transformers.Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})
        return transformers.Sam2Processor(images, target_size=SIDE)
    images = transformers.SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    return (transformers.SamHQProcessor if kind == "sam_hq" else transformers.SamProcessor)(images)


def save(folder: Path, kind: str = "sam") -> nn.Module:
    """A model with its processor, and images with objects beside it."""
    module: Any = zoo.randomised(MODELS[kind](), 0)
    module.tie_weights()
    module.save_pretrained(folder / "model")
    processor(kind).save_pretrained(folder / "model")
    detectors.write_coco(folder)
    return module


def values(**evaluation: Any) -> dict[str, Any]:
    coco = {"source": "coco", "root": "images/", "annotations": "instances.json", "batch_size": 4}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": coco, "evaluation": coco | evaluation},
    }


def loaded(folder: Path) -> FloatModel:
    return load_model(RunConfig.from_mapping({"budget": "4bit", **values()}, str(folder)).model, str(folder))


def changed(folder: Path, change: Any) -> None:
    """Rewrite the annotations."""
    rows = json.loads((folder / "instances.json").read_text())
    change(rows)
    (folder / "instances.json").write_text(json.dumps(rows))


# -- f(x) --------------------------------------------------------------------------------------------------------------


def test_outputs_are_the_embedding_the_masks_and_the_qualities(tmp_path: Path) -> None:
    """Embedding and masks weigh the same, and the scale of a mask, which has its border at zero, does not count."""
    module: Any = save(tmp_path)
    (batch, *_) = dataset(tmp_path, values()).batches
    with torch.no_grad():
        found = prompted_outputs(module, batch)
        embedding = module.vision_encoder(batch["pixel_values"]).last_hidden_state.flatten(1)
        whole = module(**batch)
    sizes = [embedding.shape[1], 3 * (SIDE // 2) ** 2, 3]
    assert found.shape == (4, sum(sizes))
    first, masks, qualities = found.split(sizes, dim=1)
    assert torch.allclose(first, embedding / embedding.norm(dim=1, keepdim=True))
    assert torch.allclose(masks.norm(dim=1), torch.ones(4))
    logits = whole.pred_masks[:, 0].flatten(2)
    assert torch.equal(masks > 0, logits.flatten(1) > 0)
    assert torch.allclose(torch.cosine_similarity(masks.view_as(logits), logits, dim=2), torch.ones(4, 3))
    assert torch.allclose(qualities * 3**0.5, whole.iou_scores[:, 0])
    assert not module.vision_encoder._forward_hooks


def test_large_maps_are_a_lattice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert VALUES < 3 * 256**2, "the masks of the published models"
    module = save(tmp_path)
    (batch, *_) = dataset(tmp_path, values()).batches
    monkeypatch.setattr("mlorq.models.mask_generation.VALUES", 300)
    with torch.no_grad():
        outputs = prompted_outputs(module, batch)
    assert 400 < outputs.shape[1] <= 603


# -- the metric --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_metric_is_that_of_every_box_alone(kind: str, tmp_path: Path) -> None:
    """Image by image and box by box, through the processor, against rectangles drawn by hand."""
    module: Any = save(tmp_path, kind)
    rows = json.loads((tmp_path / "instances.json").read_text())
    own = processor(kind)
    found = []
    for image in rows["images"]:
        picture = Image.open(tmp_path / "images" / image["file_name"]).convert("RGB")
        for row in rows["annotations"]:
            if row["image_id"] != image["id"]:
                continue
            x, y, w, h = row["bbox"]
            inputs = own(images=picture, input_boxes=[[[x, y, x + w, y + h]]], return_tensors="pt")
            with torch.no_grad():
                outputs = module(inputs["pixel_values"], input_boxes=inputs["input_boxes"].float())
            sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
            masks = own.post_process_masks(outputs.pred_masks, *sizes)[0][0]
            mask = masks[outputs.iou_scores[0, 0].argmax()].numpy()
            truth = np.zeros_like(mask)
            truth[y : y + h, x : x + w] = True
            found.append((mask & truth).sum() / (mask | truth).sum())
    data = dataset(tmp_path, values())
    assert data.metric_name == "mask_iou"
    assert data.evaluate(module) == {"mask_iou": pytest.approx(np.mean(found))}
    assert 0 < np.mean(found) < 1


def test_iou_by_hand() -> None:
    left = np.array([[True, True, False], [False, False, False]])
    right = np.array([[False, True, True], [True, False, False]])
    assert iou(left, right) == 0.25
    assert iou(left, left) == iou(left & ~left, right & ~right) == 1.0
    assert iou(left, ~left) == 0.0


def test_boxes_are_bounded_and_spread_by_size(tmp_path: Path) -> None:
    """Calibration has the middle one; crowds, and images without objects, are left out."""
    save(tmp_path)

    def change(rows: Any) -> None:
        template = rows["annotations"][0]
        sizes = [*range(1, 22), 50]  # the last one is a crowd
        rows["annotations"] = [
            template | {"id": size, "bbox": [0, 0, size, size], "iscrowd": int(size == 50)} for size in sizes
        ]
        rows["annotations"] += [template | {"id": 98, "image_id": rows["images"][3]["id"]}]
        rows["annotations"] += [template | {"id": 99, "image_id": rows["images"][1]["id"], "iscrowd": 1}]

    changed(tmp_path, change)
    data = dataset(tmp_path, values())
    (image, other) = sorted(data.evaluate.batches.images, key=lambda image: image.id)
    assert len(data.evaluate.objects[other.id]) == 1
    sides = [each.box[2] for each in data.evaluate.objects[image.id]]
    assert len(sides) == PROMPTS
    assert sides == sorted(sides, reverse=True)
    assert {round(before - after) for before, after in pairwise(sides)} <= {2, 3}
    scale = SIDE / max(image.width, image.height)
    (boxes,) = (batch["input_boxes"] for batch in dataset(tmp_path, values(), "calibration").batches)
    assert boxes.shape == (2, 1, 4)
    assert [0, 0, pytest.approx(11 * scale, rel=0.03), pytest.approx(11 * scale, rel=0.03)] in boxes[:, 0].tolist()


def test_polygons_and_run_lengths_are_the_same_masks(tmp_path: Path) -> None:
    module = save(tmp_path)
    first = dataset(tmp_path, values())

    def change(rows: Any) -> None:
        sizes = {row["id"]: (row["height"], row["width"]) for row in rows["images"]}
        for row in rows["annotations"]:
            mask = np.zeros(sizes[row["image_id"]], np.uint8)
            x, y, w, h = row["bbox"]
            mask[y : y + h, x : x + w] = 1
            flat = np.concatenate([[0], mask.T.flatten(), [2]])
            ends = np.flatnonzero(np.diff(flat)) - 0
            counts = np.diff([0, *ends[:-1], mask.size]) if flat[1] == 0 else np.diff([0, 0, *ends[1:-1], mask.size])
            row["segmentation"] = {"size": list(mask.shape), "counts": counts.tolist()}

    changed(tmp_path, change)
    second = dataset(tmp_path, values())
    assert second.key != first.key
    assert second.evaluate(module) == first.evaluate(module)


def test_annotations_at_fault_are_named(tmp_path: Path) -> None:
    module = save(tmp_path)
    good = (tmp_path / "instances.json").read_text()

    def refusal(change: Any, **evaluation: Any) -> str:
        changed(tmp_path, change)
        with pytest.raises(DataError) as caught:
            dataset(tmp_path, values(**evaluation)).evaluate(module)
        (tmp_path / "instances.json").write_text(good)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def of_first(**entries: Any) -> Any:
        return lambda rows: rows["annotations"][0].update(entries)

    assert "annotation 1 lacks 'bbox'" in refusal(of_first(bbox=None))
    assert "annotation 1: its bbox [1, 2] is not [left, top, width, height]" in refusal(of_first(bbox=[1, 2]))
    assert "annotation 1 lacks 'segmentation'" in refusal(of_first(segmentation=None))
    assert "annotation 1: its segmentation is neither polygons" in refusal(of_first(segmentation=[["a"]]))
    odd = {"size": [2, 3], "counts": [2, 4]}
    assert "annotation 1: the run lengths of its segmentation are not" in refusal(of_first(segmentation=odd))
    assert "have no objects, only images or crowds" in refusal(lambda rows: rows["annotations"].clear())
    assert "metric 'box_ap' does not fit masks of prompts; choose mask_iou" in refusal(lambda _: None, metric="box_ap")


def test_other_sources_and_other_processors_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    settings = values()
    settings["data"]["evaluation"] = {"source": "image_folder", "root": "images/"}
    with pytest.raises(DataError, match="source image_folder is for models of"):
        dataset(tmp_path, settings)
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "model")
    (tmp_path / "model/processor_config.json").unlink()
    with pytest.raises(ModelError, match="its processor, ViTImageProcessor, makes no masks of boxes"):
        dataset(tmp_path, values())


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_encoder_and_decoder_are_found_and_rebuilt(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model = loaded(tmp_path)
    batch = dataset(tmp_path, values(), "calibration").batches[0]
    again = rebuild(model.architecture)
    again.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        assert torch.allclose(model.outputs(again.eval(), batch), model.outputs(model.module, batch), atol=1e-5)
    layers = find_layers(model, batch)
    left = {row.name for row in layers.skipped}
    assert all(name.startswith(("prompt_encoder.mask_embed.", "mask_decoder.pred_obj_score")) for name in left), left
    names = {layer.name for layer in layers.layers}
    for part in ("vision_encoder.", "mask_decoder.transformer.", "mask_decoder.iou_prediction_head."):
        assert any(name.startswith(part) for name in names)


def test_a_model_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    module = save(tmp_path)
    some = ["vision_encoder.layers.1.*", "mask_decoder.transformer.layers.1.*", "mask_decoder.iou_prediction_head.*"]
    result = zoo.run(tmp_path, {**values(), "search": {**zoo.FAST, "include": some}, "budget": "6bit"})
    data = dataset(tmp_path, values())
    assert result["metric"]["name"] == "mask_iou"
    assert result["metric"]["float"] == data.evaluate(module)["mask_iou"] > 0
    location = result["checkpoint"].removeprefix("file://")
    found, again = mlorq.load(location), mlorq.load(location, weights="both")
    assert type(found) is type(module)
    with torch.no_grad():
        assert torch.equal(found(**data.batches[0]).pred_masks, again(**data.batches[0]).pred_masks)
    assert data.evaluate(found) == {"mask_iou": result["metric"]["compressed"]}
    assert (Path(location) / "preparation/processor_config.json").is_file()


@pytest.mark.parametrize("kind", MODELS)
def test_example_inputs_are_an_image_and_a_box(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model = loaded(tmp_path)
    family = FAMILIES[model.family]
    described = family.preprocess(model.architecture)
    batch = family.example_input(model.architecture, samples=2)
    assert list(batch) == described["inputs"] == ["pixel_values", "input_boxes"]
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    left, top, right, bottom = batch["input_boxes"].unbind(-1)
    assert ((left < right) & (top < bottom) & (right <= SIDE)).all()
    assert model.outputs(model.module, batch).isfinite().all()


@pytest.mark.parametrize("kind", few(list(MODELS)))
def test_graphs_take_images_and_boxes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    save(tmp_path, kind)
    model = loaded(tmp_path)
    folder_of(tmp_path / "out", compressed(model.module), model.architecture)
    batch = dataset(tmp_path, values()).batches[0]
    with torch.no_grad():
        expected = mlorq.load(tmp_path / "out")(**batch)
    found = mlorq.load(tmp_path / "out", runtime="onnxruntime", threads=1)(**batch)
    for name in ("pred_masks", "iou_scores"):
        error = (getattr(found, name) - getattr(expected, name)).abs().max() / getattr(expected, name).abs().max()
        assert float(error) < 1e-4


def test_the_encoders_of_timm_are_models_of_features(tmp_path: Path) -> None:
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "neck_chans": 8}
    arguments = {**sizes, "global_attn_indexes": [1], "window_size": 4}
    module = zoo.timm_model("samvit_base_patch16", {**arguments, "num_classes": 0})
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    for index in range(4):
        zoo.save_image(tmp_path / f"images/{index % 2}/{index}.png", index, 72)
    images = {"source": "image_folder", "root": "images/", "batch_size": 4}
    named = {"name": "samvit_base_patch16", "features": True, "checkpoint": "weights.pth", "arguments": arguments}
    settings = {"model": {"family": "timm", **named}, "data": {"calibration": images, "evaluation": images}}
    config = RunConfig.from_mapping({"budget": "4bit", **settings}, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    (batch,) = dataset(tmp_path, settings).batches
    layers = find_layers(model, batch)
    assert not layers.skipped
    assert len(layers.layers) == 11, "patches, four of each block, two of the neck"
    assert model.outputs(model.module, batch).shape == (4, 8)
