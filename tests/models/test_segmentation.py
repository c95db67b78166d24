"""Semantic segmentation: f(x), label maps, mean IoU, whole runs with their checkpoints and graphs."""

from __future__ import annotations

import struct
import zlib
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
from mlorq.data.label_maps import class_numbers
from mlorq.errors import CheckpointError, DataError
from mlorq.models import FAMILIES, load_model, rebuild
from mlorq.models.layers import find_layers
from mlorq.models.left_float import NO_GRADIENT
from mlorq.models.segmentation import VALUES, lattice, map_logits, pixel_classes
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.long import few
from tests.models.test_transformers_tasks import dataset

CLASSES = 4
SIDE = 32
TASK = "semantic-segmentation"


def segformer(seed: int = 0) -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
    )
    return zoo.randomised(transformers.SegformerForSemanticSegmentation(config), seed)


def upernet(seed: int = 3) -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    body = transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=body, hidden_size=8, pool_scales=[1, 2], auxiliary_channels=8, num_labels=CLASSES
    )
    return zoo.randomised(transformers.UperNetForSemanticSegmentation(config), seed)


def beit(seed: int = 0) -> nn.Module:
    config = transformers.BeitConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIDE,
        patch_size=8,
        out_indices=[1, 2, 3, 4],
        pool_scales=[1, 2],
        auxiliary_channels=8,
        num_labels=CLASSES,
    )
    return zoo.randomised(transformers.BeitForSemanticSegmentation(config), seed)


def dpt(seed: int = 0) -> nn.Module:
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIDE,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        num_labels=CLASSES,
    )
    return zoo.randomised(transformers.DPTForSemanticSegmentation(config), seed)


def mobilevit(seed: int = 0) -> nn.Module:
    config = transformers.MobileViTConfig(
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 8, 8, 8, 12, 16, 16],
        num_attention_heads=2,
        image_size=SIDE,
        aspp_out_channels=8,
        atrous_rates=[1, 2, 3],
        num_labels=CLASSES,
    )
    return zoo.randomised(transformers.MobileViTForSemanticSegmentation(config), seed)


MODELS = {"segformer": segformer, "upernet": upernet, "beit": beit, "dpt": dpt, "mobilevit": mobilevit}


def save(folder: Path, module: nn.Module, *, reduce: bool = False) -> None:
    """A model with its image processor, five images and their label maps."""
    module.save_pretrained(folder / "model")
    size = {"height": SIDE, "width": SIDE}
    transformers.SegformerImageProcessor(size=size, do_reduce_labels=reduce).save_pretrained(folder / "model")
    draw = np.random.default_rng(1)
    for index in range(5):
        name = f"{'train' if index % 2 else 'val'}/{index}"
        zoo.save_image(folder / f"images/{name}.png", index, 24)
        labels = draw.integers(0, CLASSES, (3, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        labels[:2] = 255
        save_mask(folder / f"masks/{name}.png", labels)


def save_mask(path: Path, labels: np.ndarray, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if mode == "P":
        image = Image.frombytes("P", image.size, labels.astype(np.uint8).tobytes())
        image.putpalette([value for index in range(256) for value in (index, 7, 255 - index)])
    image.save(path)


def values(**evaluation: Any) -> dict[str, Any]:
    images = {"source": "image_folder", "root": "images/", "batch_size": 2}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": images | {"samples": 4}, "evaluation": images | {"masks": "masks/", **evaluation}},
    }


# -- f(x) --------------------------------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Returns given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.values = logits

    def forward(self) -> Any:
        return transformers.modeling_outputs.SemanticSegmenterOutput(logits=self.values)


def test_small_maps_are_whole() -> None:
    logits = torch.randn(2, 5, 6, 7)
    assert torch.equal(map_logits(Maps(logits), {}), logits.flatten(1))


def test_large_maps_are_a_lattice_with_the_error_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    first, error = torch.randn(2, 2, 64, 40, 50, generator=generator)
    exact = float(error.square().sum() / first.square().sum())
    a, b = (map_logits(Maps(maps), {}) for maps in (first, first + error))
    assert a.shape[1] <= VALUES
    assert a.shape[1] > 0.9 * VALUES
    assert float((a - b).square().sum() / a.square().sum()) == pytest.approx(exact, rel=0.03)


def test_lattices_have_the_shape_of_the_map(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(200):
        height, width, positions = (int(value) for value in draw.integers(1, (300, 300, 3000)))
        rows, columns = lattice(height, width, positions)
        assert 1 <= rows <= height
        assert 1 <= columns <= width
        assert rows * columns <= max(1, positions)
        if height * width <= positions:
            assert (rows, columns) == (height, width)


@pytest.mark.parametrize("size", [(9, 13), (3, 40)])
def test_classes_of_pixels_are_those_of_transformers(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 7, 5, 6, generator=torch.Generator().manual_seed(2))
    processor = transformers.SegformerImageProcessor()
    outputs = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
    (expected,) = processor.post_process_semantic_segmentation(outputs, [size])
    assert torch.equal(pixel_classes(logits[0], size), expected)
    monkeypatch.setattr("mlorq.models.segmentation.PIXELS", 2 * size[0] * size[1])  # two classes at a time
    assert torch.equal(pixel_classes(logits[0], size), expected)


# -- label maps --------------------------------------------------------------------------------------------------------


def encoded(values: np.ndarray, bits: int, colour: int = 0) -> bytes:
    """A PNG file, written down from its specification; ``colour`` 3: with a palette."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    flags = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(flags.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    palette = chunk(b"PLTE", bytes(range(3 * 2 ** min(bits, 4)))) if colour == 3 else b""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + palette
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3)])
def test_pixels_are_the_numbers_in_the_file(bits: int, colour: int) -> None:
    labels = np.random.default_rng(bits).integers(0, 2**bits, (6, 8))
    assert (class_numbers(encoded(labels, bits, colour), "a.png") == labels).all()


def test_the_metric_is_that_of_all_pixels_that_count(tmp_path: Path) -> None:
    module = segformer()
    save(tmp_path, module)
    data = dataset(tmp_path, values())
    confusion = np.zeros((CLASSES, CLASSES))
    processor = transformers.SegformerImageProcessor.from_pretrained(tmp_path / "model")
    for path in sorted((tmp_path / "images").rglob("*.png")):
        labels = np.array(Image.open(tmp_path / "masks" / path.relative_to(tmp_path / "images")))
        with torch.no_grad():
            outputs = module(**processor(Image.open(path), return_tensors="pt"))
        (predicted,) = processor.post_process_semantic_segmentation(outputs, [labels.shape])
        for wanted, found in zip(labels.flatten(), predicted.flatten().tolist(), strict=True):
            if wanted != 255:
                confusion[wanted, found] += 1
    shares = []
    for number in range(CLASSES):
        union = confusion[number].sum() + confusion[:, number].sum() - confusion[number, number]
        shares += [confusion[number, number] / union] if union else []
    assert data.metric_name == "miou"
    assert data.evaluate(module) == {"miou": pytest.approx(np.mean(shares))}


def test_reduced_labels_leave_the_first_class_out(tmp_path: Path) -> None:
    save(tmp_path, segformer(), reduce=True)
    maps = dataset(tmp_path, values()).evaluate.maps
    for index, name in enumerate(maps.names):
        labels = np.array(Image.open(tmp_path / "masks" / name)).astype(int)
        assert (maps.classes(index) == np.where((labels == 0) | (labels == 255), -1, labels - 1)).all()


def test_palettes_and_other_ignored_labels(tmp_path: Path) -> None:
    save(tmp_path, segformer())
    labels = np.full((24, 24), 9, np.uint8)
    labels[:5] = 2
    for name in ("val/0", "val/2", "val/4", "train/1", "train/3"):
        save_mask(tmp_path / f"masks/{name}.png", labels, "P")
    found = dataset(tmp_path, values(ignored_label=9))
    assert {tuple(np.unique(found.evaluate.maps.classes(index))) for index in range(5)} == {(-1, 2)}
    with pytest.raises(DataError, match=r"^mask train/1.png: label 9 is out of range: the model has 4 classes$"):
        dataset(tmp_path, values())


def test_maps_at_fault_are_named(tmp_path: Path) -> None:
    save(tmp_path, segformer())
    mask = tmp_path / "masks/val/2.png"
    good = mask.read_bytes()

    def refusal(**evaluation: Any) -> str:
        with pytest.raises(DataError) as caught:
            dataset(tmp_path, values(**evaluation))
        mask.write_bytes(good)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    mask.unlink()
    assert "mask val/2.png of image val/2.png is missing in" in refusal()
    save_mask(mask, np.zeros((24, 20), np.uint8))
    assert "mask val/2.png is 20 × 24, but image val/2.png is 24 × 24" in refusal()
    zoo.save_image(mask, 0, 24)
    assert "mask val/2.png has mode RGB: store class numbers as a grey or palette image" in refusal()
    mask.write_bytes(b"no image")
    assert "mask val/2.png cannot be decoded" in refusal()
    assert "folder of masks" in refusal(masks="nothing/")
    (tmp_path / "labels.tsv").write_text("file\tlabel\nval/0.png\t1\n")
    assert "labels labels.tsv are not for task semantic-segmentation: give masks" in refusal(labels="labels.tsv")
    assert "metric 'accuracy' does not fit maps of classes; choose miou" in refusal(metric="accuracy")
    assert "metric miou needs label maps" in refusal(masks=None, metric="miou")


def test_masks_are_for_segmentation_alone(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    save(tmp_path, transformers.ViTForImageClassification(config))
    settings = values()
    settings["model"]["task"] = "image-classification"
    with pytest.raises(DataError, match="masks masks/ are for task semantic-segmentation: leave masks out"):
        dataset(tmp_path, settings)


def test_images_of_several_sizes_in_a_batch(tmp_path: Path) -> None:
    save(tmp_path, dpt())
    size = {"height": SIDE, "width": SIDE}
    settings = {"size": size, "keep_aspect_ratio": True, "ensure_multiple_of": 8}
    transformers.DPTImageProcessor(**settings).save_pretrained(tmp_path / "model")
    Image.open(tmp_path / "images/val/0.png").resize((24, 48)).save(tmp_path / "images/val/0.png")
    batches = dataset(tmp_path, values(), "calibration").batches
    with pytest.raises(DataError, match="several sizes do not go into one batch \\(set batch_size: 1\\)"):
        list(batches)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(MODELS))
def test_models_of_segmentation_are_loaded_and_rebuilt(kind: str, tmp_path: Path) -> None:
    module = MODELS[kind]()
    save(tmp_path, module)
    settings = values()
    data = dataset(tmp_path, settings, "calibration")
    model = load_model(RunConfig.from_mapping({"budget": "4bit", **settings}, str(tmp_path)).model, str(tmp_path))
    again = rebuild(model.architecture)
    again.load_state_dict(model.module.state_dict())
    batch = data.batches[0]
    with torch.no_grad():
        expected = module(**batch).logits.flatten(1)
    assert torch.equal(model.outputs(again.eval(), batch), expected)
    assert model.architecture["input_size"] == [SIDE, SIDE]
    layers = find_layers(model, batch)
    assert len(layers.layers) > 3
    assert not [row.name for row in layers.skipped if row.reason == NO_GRADIENT]


def test_a_model_of_segmentation_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    save(tmp_path, segformer())
    result = zoo.run(tmp_path, {**values(), "search": zoo.FAST, "budget": "6bit"})
    assert result["metric"]["name"] == "miou"
    location = result["checkpoint"].removeprefix("file://")
    loaded, again = mlorq.load(location), mlorq.load(location, weights="both")
    data = dataset(tmp_path, values())
    with torch.no_grad():
        assert torch.equal(loaded(**data.batches[0]).logits, again(**data.batches[0]).logits)
    assert data.evaluate(loaded) == {"miou": result["metric"]["compressed"]}


@pytest.mark.parametrize("kind", few(list(MODELS), "segformer"))
def test_graphs_of_models_of_segmentation(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    save(tmp_path, MODELS[kind]())
    config = RunConfig.from_mapping({"budget": "4bit", **values()}, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    folder_of(tmp_path / "out", compressed(model.module), model.architecture)
    batch = dataset(tmp_path, values()).batches[0]
    with torch.no_grad():
        expected = mlorq.load(tmp_path / "out")(**batch).logits
    found = mlorq.load(tmp_path / "out", runtime="onnxruntime", threads=1)(**batch).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_example_inputs_have_the_size_of_the_image_processor(tmp_path: Path) -> None:
    save(tmp_path, segformer())
    config = RunConfig.from_mapping({"budget": "4bit", **values()}, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    family = FAMILIES[model.family]
    assert family.example_input(model.architecture, samples=2)["pixel_values"].shape == (2, 3, SIDE, SIDE)
    described = family.preprocess(model.architecture)
    assert described == {"kind": "image", "inputs": ["pixel_values"], "channels": 3, "height": SIDE, "width": SIDE}
    for size in ("32", [32], [32, 0], [32, 2**20], [32.0, 32]):
        with pytest.raises(CheckpointError, match=r"architecture.input_size .* is not \[height, width\]"):
            rebuild({**model.architecture, "input_size": size})
    for file in (tmp_path / "model").glob("*processor*"):
        file.unlink()
    assert "input_size" not in load_model(config.model, str(tmp_path)).architecture
