"""Depth estimation: f(x), depth maps, relative error, whole runs with their checkpoints and graphs."""

from __future__ import annotations

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
from mlorq.data.metrics import depth_error
from mlorq.errors import DataError
from mlorq.models import FAMILIES, FloatModel, load_model, rebuild
from mlorq.models.layers import find_layers
from mlorq.models.left_float import NO_GRADIENT
from mlorq.models.segmentation import VALUES, depth_outputs
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.long import few
from tests.models.test_transformers_tasks import dataset

TASK = "depth-estimation"
SIDE = 32
IMAGE = 40
SCALE = 1000.0
SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
PLACES = ["train/0", "train/1", "val/2", "val/3", "val/4"]


def dpt() -> nn.Module:
    config = transformers.DPTConfig(
        intermediate_size=24, image_size=SIDE, patch_size=8, backbone_out_indices=[0, 1, 2, 3], **SMALL, **NECK
    )
    return transformers.DPTForDepthEstimation(config)


def depth_anything() -> nn.Module:
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = transformers.Dinov2Config(
        image_size=SIDE, patch_size=8, mlp_ratio=2, out_features=stages, reshape_hidden_states=False, **SMALL
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=16, head_hidden_size=8, **NECK
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def glpn() -> nn.Module:
    config = transformers.GLPNConfig(
        depths=[1, 1, 1, 1],
        sr_ratios=[2, 2, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=8,
    )
    return transformers.GLPNForDepthEstimation(config)


MODELS = {"dpt": dpt, "depth_anything": depth_anything, "glpn": glpn}


def save(folder: Path, kind: str = "dpt") -> nn.Module:
    """A model with its image processor, five images and their depth maps, of two formats, in thousandths."""
    module = zoo.randomised(MODELS[kind](), 1)
    head = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)][-1]
    if kind != "glpn":
        head.bias.data.fill_(2.0)  # the last activation has no negative values
    module.save_pretrained(folder / "model")
    if kind == "glpn":
        transformers.GLPNImageProcessor(size_divisor=32).save_pretrained(folder / "model")
    else:
        size = {"height": SIDE, "width": SIDE}
        transformers.DPTImageProcessor(size=size).save_pretrained(folder / "model")
    draw = np.random.default_rng(1)
    for index, name in enumerate(PLACES):
        zoo.save_image(folder / f"images/{name}.png", index, IMAGE)
        depths = draw.integers(500, 9000, (IMAGE, IMAGE)).astype(np.uint16)
        depths[:3] = 0
        path = folder / f"depths/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index % 2:
            values = depths.astype(np.float32)
            values[0] = np.nan
            np.save(f"{path}.npy", values)
        else:
            Image.fromarray(depths).save(f"{path}.png")
    return module


def values(**evaluation: Any) -> dict[str, Any]:
    images = {"source": "image_folder", "root": "images/", "batch_size": 2}
    measured = {"depths": "depths/", "depth_scale": SCALE, **evaluation}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": images | {"samples": 4}, "evaluation": images | measured},
    }


def loaded(folder: Path) -> FloatModel:
    return load_model(RunConfig.from_mapping({"budget": "4bit", **values()}, str(folder)).model, str(folder))


# -- f(x) and metric ---------------------------------------------------------------------------------------------------


class Depths(nn.Module):
    """Returns given depths."""

    def __init__(self, depths: torch.Tensor) -> None:
        super().__init__()
        self.values = depths

    def forward(self) -> Any:
        return transformers.modeling_outputs.DepthEstimatorOutput(predicted_depth=self.values)


def test_large_maps_are_a_lattice() -> None:
    small, large = torch.rand(2, 30, 40), torch.rand(2, 384, 500)
    assert torch.equal(depth_outputs(Depths(small), {}), small.flatten(1))
    found = depth_outputs(Depths(large), {})
    assert 0.9 * VALUES < found.shape[1] <= VALUES
    assert float(found.square().mean()) == pytest.approx(float(large.square().mean()), rel=0.02)


def test_errors_by_hand() -> None:
    depths = np.array([1.0, 2.0, 4.0])
    assert depth_error(np.array([1.0, 3.0, 3.0]), depths) == pytest.approx((0 + 1 / 2 + 1 / 4) / 3)
    assert depth_error(5 - 2 * depths, depths, "depth") == pytest.approx(0)
    assert depth_error(5 + 2 / depths, depths, "inverse") == pytest.approx(0)
    assert depth_error(5 + 2 / depths, depths, "depth") > 0.1
    constant = depth_error(np.ones(3), depths, "depth")
    assert constant == pytest.approx(np.mean(np.abs(7 / 3 - depths) / depths))


def test_an_alignment_is_the_least_squares_of_numpy() -> None:
    draw = np.random.default_rng(2)
    depths, predicted = draw.uniform(1, 9, 300), draw.normal(size=300)
    columns = np.stack([predicted, np.ones(300)], 1)
    fitted = columns @ np.linalg.lstsq(columns, depths, rcond=None)[0]
    assert depth_error(predicted, depths, "depth") == pytest.approx(np.mean(np.abs(fitted - depths) / depths))
    inverse = columns @ np.linalg.lstsq(columns, 1 / depths, rcond=None)[0]
    bounded = 1 / np.maximum(inverse, 1 / depths.max())
    assert depth_error(predicted, depths, "inverse") == pytest.approx(np.mean(np.abs(bounded - depths) / depths))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("align", [None, "inverse"])
def test_the_metric_is_that_of_every_image(kind: str, align: str | None, tmp_path: Path) -> None:
    """Images one by one, through the image processor; pixels without depth do not count."""
    module = save(tmp_path, kind)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    errors = []
    for name in PLACES:
        image = Image.open(tmp_path / f"images/{name}.png").convert("RGB")
        array = tmp_path / f"depths/{name}.npy"
        depths = np.load(array) if array.is_file() else np.array(Image.open(array.with_suffix(".png")))
        with torch.no_grad():
            outputs = module(**processor(images=image, return_tensors="pt"))
        (row,) = processor.post_process_depth_estimation(outputs, target_sizes=[(IMAGE, IMAGE)])
        counts = np.nan_to_num(depths) > 0
        assert counts.sum() == (IMAGE - 3) * IMAGE
        predicted = row["predicted_depth"].reshape(IMAGE, IMAGE).numpy()[counts]
        errors.append(depth_error(predicted, depths[counts] / SCALE, align))
    data = dataset(tmp_path, values(depth_align=align))
    assert data.metric_name == "depth_error"
    assert data.evaluate(module) == {"depth_error": pytest.approx(np.mean(errors), rel=1e-5)}


def test_scale_and_alignment_are_part_of_the_key(tmp_path: Path) -> None:
    save(tmp_path)
    keys = {
        dataset(tmp_path, values(**own)).key
        for own in ({}, {"depth_scale": 1.0}, {"depth_align": "depth"}, {"depth_align": "inverse"})
    }
    assert len(keys) == 4


def test_maps_at_fault_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    png, npy = tmp_path / "depths/val/2.png", tmp_path / "depths/val/3.npy"
    good = {path: path.read_bytes() for path in (png, npy)}

    def refusal(**evaluation: Any) -> str:
        with pytest.raises(DataError) as caught:
            dataset(tmp_path, values(**evaluation))
        for path, data in good.items():
            path.write_bytes(data)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    png.unlink()
    assert "depth map val/2.png or val/2.npy of image val/2.png is missing in" in refusal()
    Image.fromarray(np.ones((IMAGE, 20), np.uint16)).save(png)
    assert "depth map val/2.png is 20 × 40, but image val/2.png is 40 × 40" in refusal()
    Image.fromarray(np.zeros((IMAGE, IMAGE), np.uint16)).save(png)
    assert "depth map val/2.png has no pixel with a depth above 0" in refusal()
    zoo.save_image(png, 0, 24)
    assert "depth map val/2.png has mode RGB: store depths as a grey image" in refusal()
    png.write_bytes(b"no image")
    assert "depth map val/2.png cannot be decoded" in refusal()
    np.save(npy, np.ones((IMAGE, IMAGE, 3)))
    assert "depth map val/3.npy is no matrix of numbers, (height, width)" in refusal()
    npy.write_bytes(b"no array")
    assert "depth map val/3.npy cannot be read" in refusal()
    assert "folder of depth maps" in refusal(depths="nothing/")
    (tmp_path / "labels.tsv").write_text("file\tlabel\nval/2.png\t1\n")
    assert "are not for task depth-estimation: give depths" in refusal(labels="labels.tsv")
    assert "metric 'miou' does not fit depths; choose depth_error" in refusal(metric="miou")
    assert "metric depth_error needs source image_folder with depths" in refusal(depths=None, metric="depth_error")


def test_depths_are_for_depth_estimation_alone(tmp_path: Path) -> None:
    save(tmp_path)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    settings = values()
    settings["model"]["task"] = "image-classification"
    with pytest.raises(DataError, match="depths depths/ are for task depth-estimation: leave depths out"):
        dataset(tmp_path, settings)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_depth_are_loaded_and_rebuilt(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model = loaded(tmp_path)
    batch = dataset(tmp_path, values(), "calibration").batches[0]
    again = rebuild(model.architecture)
    again.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        outputs = model.outputs(model.module, batch)
        tolerance = 1e-5 * float(outputs.abs().max())  # of other orders of summation
        assert torch.allclose(model.outputs(again.eval(), batch), outputs, rtol=1e-4, atol=tolerance)
    assert float(outputs.std()) > 0
    layers = find_layers(model, batch)
    assert len(layers.layers) > 20
    assert not [row.name for row in layers.skipped if row.reason == NO_GRADIENT]
    family = FAMILIES[model.family]
    made = family.example_input(model.architecture, samples=2)
    assert list(made) == family.preprocess(model.architecture)["inputs"] == ["pixel_values"]
    if kind != "glpn":
        assert made["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert model.outputs(model.module, made).isfinite().all()


@pytest.mark.long
def test_a_model_of_depth_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    module = save(tmp_path, "depth_anything")
    search = {**zoo.FAST, "include": ["backbone.encoder.layer.1.*", "head.*"]}
    result = zoo.run(tmp_path, {**values(depth_align="inverse"), "search": search, "budget": "6bit"})
    data = dataset(tmp_path, values(depth_align="inverse"))
    assert result["metric"]["name"] == "depth_error"
    assert result["metric"]["float"] == data.evaluate(module)["depth_error"]
    location = result["checkpoint"].removeprefix("file://")
    found, again = mlorq.load(location), mlorq.load(location, weights="both")
    assert type(found) is type(module)
    with torch.no_grad():
        assert torch.equal(found(**data.batches[0]).predicted_depth, again(**data.batches[0]).predicted_depth)
    assert data.evaluate(found) == {"depth_error": result["metric"]["compressed"]}
    assert (Path(location) / "preparation/preprocessor_config.json").is_file()


@pytest.mark.parametrize("kind", few(list(MODELS)))
def test_graphs_of_models_of_depth(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    save(tmp_path, kind)
    model = loaded(tmp_path)
    folder_of(tmp_path / "out", compressed(model.module), model.architecture)
    # Graphs have one size of images. GLPN's image processor keeps that of the image; the example is a large one.
    batch = dataset(tmp_path, values()).batches[0]
    if kind == "glpn":
        batch = FAMILIES[model.family].example_input(model.architecture, samples=2)
    with torch.no_grad():
        expected = mlorq.load(tmp_path / "out")(**batch).predicted_depth
    found = mlorq.load(tmp_path / "out", runtime="onnxruntime", threads=1)(**batch).predicted_depth
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
