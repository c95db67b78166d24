"""Detectors: published checkpoints, parts unlike timm's and torchvision's, f(x), COCO data, whole runs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.swin_transformer import SwinTransformerBlock

import mlorq
from mlorq.calibration.collect import capture
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import save
from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section, source_section
from mlorq.data import load_dataset
from mlorq.data.average_precision import average_precisions, result_rows
from mlorq.errors import ConfigError, DataError, MlorqError, ModelError
from mlorq.extras import install_command
from mlorq.forms.base import Candidate
from mlorq.forms.modules import CompressedLinear, replace_layers
from mlorq.models import detection_keys, load_model, mask_rcnn, rebuild
from mlorq.models.batches import move_batch
from mlorq.models.detection_parts import AlignedRegions, ExactAnchors, PadFirstBlock
from mlorq.models.layers import find_layers
from mlorq.models.partial_forward import Segments, enters_cleanly
from mlorq.models.transformers_detection import match_names
from mlorq.models.unfolding import input_tokens
from tests import detectors, zoo
from tests.forms.test_modules import random_compressed
from tests.long import few

ModelConfig = model_section()

DEPTHS = tuple(detectors.ARGUMENTS["depths"])
# Few candidates and few probes: these runs show that all goes together, not how well.
FAST = {
    "samples": 2,
    "points": 2,
    "bits": [4, 8],
    "factor_bits": [4],
    "percentiles": [0.99, 1.0],
    "hessian_samples": 2,
    "hessian_probes": 2,
    "hessian_min_probes": 2,
    "hessian_mode": "probes",
    "sensitivity": "closed_form",
}


def config(checkpoint: str = "weights.safetensors", **changes) -> ModelConfig:
    arguments = {**detectors.ARGUMENTS, **changes}
    return ModelConfig(family="detection", name=detectors.NAME, checkpoint=checkpoint, arguments=arguments)


def refusal(kind: type[MlorqError], call, *arguments, **keywords) -> str:
    """The message with which something is refused: one line."""
    with pytest.raises(kind) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Mask R-CNN's weights and six images with their annotations."""
    place = tmp_path_factory.mktemp("coco")
    safetensors.torch.save_file(detectors.mask_rcnn(3).state_dict(), place / "weights.safetensors")
    detectors.write_coco(place)
    return place


def dataset(folder: Path, role: str = "evaluation", model: ModelConfig | None = None, seed: int = 0, **values):
    source = source_section()(
        source="coco", **{"root": "images", "annotations": "instances.json", "batch_size": 2, **values}
    )
    return load_dataset(source, role, None, model or config(), str(folder), seed)


# -- published checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mmdetection", "swin"])
@pytest.mark.parametrize(("name", "keys", "blocks"), [(detectors.NAME, 231, 12), ("mask_rcnn_swin_small", 399, 24)])
def test_every_published_key_has_a_place_or_a_reason(layout, name, keys, blocks):
    depths = tuple(mask_rcnn.BACKBONES[name]["depths"])
    published = detectors.published_keys(layout, depths)
    assert len(set(published)) == len(published) == keys
    assert detection_keys.layout_of(published) == layout
    with torch.device("meta"):
        ours = rebuild({"family": "detection", "name": name, "arguments": {}}).state_dict()
    sources = [detection_keys.source_key(key, layout) for key in ours]
    assert len(set(sources)) == len(sources), "no two tensors of ours come from one of theirs"
    left = set(published) - set(sources)
    assert set(sources) <= set(published)
    assert len(left) == blocks
    assert all(detection_keys.unused(key) for key in left)
    assert not any(detection_keys.unused(key) for key in sources)


@pytest.mark.parametrize("layout", ["mmdetection", "swin"])
def test_published_checkpoints_load_to_the_weights_they_were_made_of(layout, tmp_path):
    module = detectors.mask_rcnn(5)
    predictors = module.roi_heads.box_predictor.bbox_pred, module.roi_heads.mask_predictor.mask_fcn_logits
    with torch.no_grad():
        for predictor, rows in zip(predictors, (4, 1), strict=True):  # background, of which they hold nothing
            predictor.weight[:rows] = 0
            predictor.bias[:rows] = 0
    torch.save({"state_dict": detectors.published_state(module, layout, DEPTHS), "meta": {}}, tmp_path / "w.pth")
    model = load_model(config("w.pth"), str(tmp_path))
    for name, value in module.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name
    safetensors.torch.save_file(module.state_dict(), tmp_path / "own.safetensors")
    assert load_model(config("own.safetensors"), str(tmp_path)).key == model.key


def test_patch_merging_in_the_published_order_gives_the_same_features():
    merging = detectors.mask_rcnn(2).backbone.body.layers_1.downsample
    x = torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    # As mmdetection does it: nn.Unfold of the map, then norm and reduction.
    columns = torch.nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2)).transpose(1, 2)
    norm = F.layer_norm(
        columns, (32,), detectors.unfold_order(merging.norm.weight), detectors.unfold_order(merging.norm.bias)
    )
    wanted = norm @ detectors.unfold_order(merging.reduction.weight).T
    torch.testing.assert_close(merging(x).reshape(2, 6, 16), wanted)
    assert torch.equal(
        detection_keys.merging_order(detectors.unfold_order(merging.reduction.weight)), merging.reduction.weight
    )


@pytest.mark.parametrize("layout", ["mmdetection", "swin"])
def test_checkpoints_at_fault_are_named(layout, tmp_path):
    state = detectors.published_state(detectors.mask_rcnn(), layout, DEPTHS)

    def loading(changed) -> str:
        torch.save(changed, tmp_path / "w.pth")
        return refusal(ModelError, load_model, config("w.pth"), str(tmp_path))

    message = loading({**state, "backbone.absolute_pos_embed": torch.ones(2)})
    assert "'backbone.absolute_pos_embed'" in message
    message = loading({name: value for name, value in state.items() if name != "neck.fpn_convs.1.conv.bias"})
    assert "no tensor 'neck.fpn_convs.1.conv.bias'" in message
    assert layout in message
    message = loading({**state, "rpn_head.rpn_cls.weight": torch.ones(2, 8, 1, 1)})
    assert "rpn.head.cls_logits.weight" in message
    message = loading({"model.layers.0.weight": torch.ones(2)})
    assert "unknown layout" in message
    assert "'model.layers.0.weight'" in message


def test_models_at_fault_are_named(folder):
    message = refusal(ModelError, load_model, config(windowsize=3), str(folder))
    assert "'windowsize'" in message
    assert "window_size" in message
    unknown = config().model_copy(update={"name": "mask_rcnn_resnet"})
    assert "mask_rcnn_swin_small" in refusal(ModelError, load_model, unknown, str(folder))
    assert "backbone" in refusal(ModelError, load_model, config(embed_dim=16), str(folder))
    assert "invalid arguments" in refusal(ModelError, load_model, config(depths=[1, 1], num_heads=[1]), str(folder))
    assert "gone.pth does not exist" in refusal(ModelError, load_model, config("gone.pth"), str(folder))
    data = {"calibration": {"source": "coco", "root": "x"}, "evaluation": {"source": "coco", "root": "x"}}
    values = {"model": {"family": "detection", "name": detectors.NAME}, "data": data}
    assert "checkpoint" in refusal(ConfigError, RunConfig.from_mapping, values)
    values["model"]["checkpoint"] = "w.pth"
    assert "annotations" in refusal(ConfigError, RunConfig.from_mapping, values)


# -- parts --------------------------------------------------------------------------------------------------


def pad_then_roll(block: SwinTransformerBlock, x: torch.Tensor) -> torch.Tensor:
    """Window attention written out: every token attends to those of its window that were its neighbours."""
    samples, height, width, channels = x.shape
    window, shift = block.window_size[0], block.shift_size[0]
    heads = block.attn.num_heads
    tall, wide = -(-height // window) * window, -(-width // window) * window
    padded = x.new_zeros(samples, tall, wide, channels)
    padded[:, :height, :width] = x
    qkv = F.linear(padded, block.attn.qkv.weight, block.attn.qkv.bias).reshape(samples, tall, wide, 3, heads, -1)
    out = torch.zeros_like(padded)
    for top in range(0, tall, window):
        for left in range(0, wide, window):
            # Where the window's tokens come from, and whether they were brought round the edge.
            places = [(top + i + shift, left + j + shift) for i in range(window) for j in range(window)]
            rows, columns = (torch.tensor(values) for values in zip(*places, strict=True))
            # Wrapped rows (or columns) and the others do not see each other; those beyond the last full window of
            # the rolled map are apart anyway.
            around = torch.stack([rows >= tall, columns >= wide], dim=1)
            apart = (around[:, None] != around[None]).any(-1)
            q, k, v = qkv[:, rows % tall, columns % wide].permute(2, 0, 3, 1, 4)
            table = block.attn.relative_position_bias_table.reshape(2 * window - 1, 2 * window - 1, heads)
            row_steps = rows[:, None] - rows[None] + window - 1
            column_steps = columns[:, None] - columns[None] + window - 1
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + table[row_steps, column_steps].permute(2, 0, 1)
            weights = scores.masked_fill(apart, -torch.inf).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).reshape(samples, window * window, channels)
            out[:, rows % tall, columns % wide] = F.linear(mixed, block.attn.proj.weight, block.attn.proj.bias)
    return out[:, :height, :width]


@pytest.mark.parametrize("size", [(7, 8), (6, 9), (3, 4), (2, 2)])
@pytest.mark.parametrize("shift", [0, 1])
def test_windows_are_padded_and_then_shifted(size, shift):
    settings = {"input_resolution": (56, 56), "num_heads": 2, "window_size": 3, "shift_size": shift}
    block = SwinTransformerBlock(8, **settings, always_partition=True, dynamic_mask=True)
    zoo.randomised(block, 4)
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        timms = block._attn(x)
        block.__class__ = PadFirstBlock
        found = block._attn(x)
        wanted = pad_then_roll(block, x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if shift and any(side % 3 for side in size):
        assert not torch.allclose(timms, wanted, atol=1e-3), "which is why timm's is not used"


def test_all_blocks_of_a_detector_pad_first_and_windows_keep_their_size():
    module = detectors.mask_rcnn()
    names = mask_rcnn.block_names(module)
    assert len(names) == sum(DEPTHS)
    assert not any(type(child) is SwinTransformerBlock for child in module.modules())
    blocks = [module.get_submodule(name) for name in names]
    assert all(block.window_size == (3, 3) for block in blocks)
    assert [block.shift_size for block in blocks] == [(0, 0)] * 3 + [(1, 1), (0, 0)]


def test_anchors_are_exact_where_maps_are_rounded_up():
    maps = [torch.zeros(1, 1, 25, 4), torch.zeros(1, 1, 13, 2)]
    found = ExactAnchors([32, 64])(type("Images", (), {"image_sizes": [(800, 100)] * 2}), maps)
    assert len(found) == 2
    anchors = found[0].reshape(-1, 3, 4)
    assert anchors.shape[0] == 25 * 4 + 13 * 2
    root = 2**0.5
    base = torch.tensor([[-128 * root, -64 * root], [-128, -128], [-64 * root, -128 * root]])
    torch.testing.assert_close(anchors[0], torch.cat([base, -base], 1))
    last = anchors[-1] - torch.tensor([64.0, 768.0, 64.0, 768.0])  # at 12 strides of 64, not of 800 // 13 = 61
    torch.testing.assert_close(last, 2 * torch.cat([base, -base], 1))


def test_regions_are_aligned_and_come_from_the_level_of_their_size():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    maps = {"0": ramp, "1": 1000 + ramp[..., :32, :32]}
    boxes = [torch.tensor([[0.0, 0.0, 160.0, 160.0], [16.0, 32.0, 48.0, 64.0]])]
    found = AlignedRegions(["0", "1"], [4, 8], 2)(maps, boxes)
    assert found.shape == (2, 1, 2, 2)
    # A cell's value is the ramp at its centre; pixel centres lie half a pixel from the edge.
    torch.testing.assert_close(found[0, 0, 0], 1000 + torch.tensor([40.0, 120.0]) / 8 - 0.5)
    torch.testing.assert_close(found[1, 0, 0], torch.tensor([24.0, 40.0]) / 4 - 0.5)


# -- f(x) ---------------------------------------------------------------------------------------------------


def batch(samples: int = 2, seed: int = 0, size: tuple[int, int] = (64, 64)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(samples, 3, *size, generator=generator)
    sizes = torch.tensor([[size[0] - 8 * (index % 2), size[1] - 4] for index in range(samples)])
    return {"pixel_values": pixels, "image_sizes": sizes}


def test_outputs_have_one_width_and_samples_do_not_touch_each_other():
    module = detectors.mask_rcnn(1).double()  # batches of other sizes are added up in another order
    both = move_batch(batch(), "cpu", torch.float64)
    with torch.no_grad():
        found = mask_rcnn.label_free_outputs(module, both)
        alone = [
            mask_rcnn.label_free_outputs(module, {name: value[i : i + 1] for name, value in both.items()})
            for i in range(2)
        ]
        other = mask_rcnn.label_free_outputs(module, move_batch(batch(3, size=(32, 96)), "cpu", torch.float64))
    points, regions = mask_rcnn.POINTS**2, sum(number**2 for _, number in mask_rcnn.REGIONS)
    width = points * 5 * 3 * 5 + regions * (4 + 3 * 4 + 3 * mask_rcnn.MASK_POINTS**2)
    assert found.shape == (2, width)
    assert other.shape == (3, width)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_the_grid_of_regions_reaches_every_level_of_the_pyramid():
    boxes = mask_rcnn.regions((800, 1333))
    assert boxes.shape == (93, 4)
    assert boxes[0].tolist() == [0, 0, 1333, 800]
    assert boxes[4].tolist() == [666.5, 400, 1333, 800]
    assert bool((boxes[:, :2] >= 0).all())
    assert bool((boxes[:, 2:] <= torch.tensor([1333, 800])).all())
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (side / 56 + 1e-6).log2().floor().clamp(0, 3)
    assert set(levels.tolist()) == {0, 1, 2, 3}


def test_outputs_depend_on_every_weight():
    module = detectors.mask_rcnn(1).requires_grad_(True)
    mask_rcnn.label_free_outputs(module, batch()).square().sum().backward()
    for name, value in module.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_blocks_of_several_stages_are_no_chain_to_be_entered(folder):
    model = load_model(config(), str(folder))
    segments = Segments(model, model.module, model.blocks)
    one = batch()
    whole = segments.outputs(one)
    # The first stage's block may be skipped; behind the next one, the first stage would put out what that one does.
    for start, holds in ((1, True), (2, False), (len(model.blocks), False)):
        carry = segments.advance(one, 0, None, start)
        assert enters_cleanly(segments, one, start, carry, whole) is holds
    assert torch.equal(segments.outputs(one), whole)


def test_statistics_of_heads_are_taken_by_sample(folder):
    model = load_model(config(), str(folder))
    both = batch()
    layers = find_layers(model, both)
    names = [layer.name for layer in layers.layers]
    assert {"rpn.head.conv.0.0", "roi_heads.box_head.fc6", "roi_heads.mask_predictor.mask_fcn_logits"} <= set(names)
    assert len(layers.blocks) == sum(DEPTHS)
    chosen = [
        layers["roi_heads.box_head.fc6"],
        layers["roi_heads.mask_head.0.0"],
        layers["backbone.fpn.inner_blocks.0.0"],
    ]
    single = [{name: value[i : i + 1] for name, value in both.items()} for i in range(2)]

    def inputs(layer, one, samples):
        module = model.module.get_submodule(layer.name)
        seen = []
        handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        with torch.no_grad():
            model.outputs(model.module, one)
        handle.remove()
        return input_tokens(module, seen[0], samples)

    for layer in chosen:
        apart = torch.cat([inputs(layer, one, 1) for one in single])
        torch.testing.assert_close(inputs(layer, both, 2), apart, atol=1e-4, rtol=1e-3)
    assert inputs(chosen[0], both, 2).shape == (2, 93, 8 * 49)
    # Squared by sample, before the mean: the exact value of one batch of two is that of two batches of one.
    head = replace(model, forward=lambda module, one: mask_rcnn.label_free_outputs(module, one)[:, ::997])
    together, separate = (
        label_free_hessian(head, chosen[:2], batches, mode="exact", device="cpu") for batches in ([both], single)
    )
    for layer in chosen[:2]:
        torch.testing.assert_close(together[layer.name], separate[layer.name], atol=1e-9, rtol=1e-3)
        assert together[layer.name].max() > 0
    captured = capture(model, layers.layers, [both], moments=True)
    assert captured.reference.shape[0] == 2
    assert all(torch.isfinite(sums.means()).all() for sums in captured.inputs.values())


def test_prepared_batches_give_what_torchvisions_own_call_gives(folder):
    model = load_model(config(), str(folder))
    images = [Image.open(folder / "images" / f"{index}.png").convert("RGB") for index in (0, 1)]
    detector = mask_rcnn.detector(config().name, config().arguments)
    prepared = detector.prepare(images)
    assert prepared["pixel_values"].shape[-2:] == (96, 96)  # sides 48 and 72, to multiples of 32
    assert prepared["image_sizes"].tolist() == [[72, 48], [48, 72]]
    assert float(prepared["pixel_values"][0, :, :, 48:].abs().max()) == 0
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    with torch.no_grad():
        found = detector.detect(model.module, prepared, [(60, 40), (40, 60)])
        wanted = model.module(tensors)
    for one, other in zip(found, wanted, strict=True):
        assert 0 < len(one.scores) <= 8
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(one, name), other[name])
        assert torch.equal(one.masks, other["masks"][:, 0] > 0.5)


def test_detectors_in_half_precision_and_images_without_detections():
    module = detectors.mask_rcnn(1).requires_grad_(False)
    both = batch()
    wanted = mask_rcnn.label_free_outputs(module, both)
    half = copy.deepcopy(module).to(torch.bfloat16)
    moved = move_batch(both, "cpu", torch.bfloat16)
    found = mask_rcnn.label_free_outputs(half, moved)
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    (first, _) = mask_rcnn.detect(half, moved, [(60, 60), (60, 60)])
    assert first.boxes.dtype == torch.float32
    module.roi_heads.score_thresh = 1.0
    for row in mask_rcnn.detect(module, both, [(60, 60), (50, 40)]):
        assert row.boxes.shape == (0, 4)
        assert row.masks.shape[0] == 0
        assert result_rows(1, row, {1: 2}) == []


# -- data ---------------------------------------------------------------------------------------------------


def test_coco_batches_are_ordered_by_shape_and_keyed_by_content(folder, tmp_path):
    data = dataset(folder, "calibration")
    assert data.samples == 6
    assert [one["pixel_values"].shape[0] for one in data.batches] == [2, 2, 2]
    ratios = torch.cat([one["image_sizes"] for one in data.batches]).float()
    ratios = ratios[:, 0] / ratios[:, 1]
    assert torch.equal(ratios, ratios.sort().values)
    assert data.evaluate is None
    assert data.batches[0] is data.batches[0], "calibration data is decoded once"
    assert dataset(folder, "calibration", seed=1).key == data.key
    assert dataset(folder, "calibration", batch_size=3).key != data.key
    assert dataset(folder, "calibration", model=config(min_size=64)).key != data.key
    chosen = [dataset(folder, "calibration", samples=3, seed=seed).key for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 2
    truth = json.loads((folder / "instances.json").read_text())
    truth["annotations"][0]["bbox"][0] += 1
    (tmp_path / "moved.json").write_text(json.dumps(truth))
    moved = str(tmp_path / "moved.json")
    assert dataset(folder, "calibration", annotations=moved).key == data.key, "calibration looks at no label"
    assert dataset(folder, annotations=moved).key != dataset(folder).key


def test_coco_at_an_fsspec_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in (folder / "images").iterdir():
        memory.pipe_file(f"/coco/images/{file.name}", file.read_bytes())
    memory.pipe_file("/coco/instances.json", (folder / "instances.json").read_bytes())
    remote = dataset(folder, root="memory://coco/images", annotations="memory://coco/instances.json")
    assert remote.key == dataset(folder).key


def test_the_truth_found_by_a_model_has_precision_one(folder):
    data = dataset(folder)
    truth = json.loads((folder / "instances.json").read_text())
    labels = {category: label for label, category in enumerate(sorted(detectors.CATEGORIES), 1)}

    def found(_, one, sizes):
        rows = []
        for height, width in sizes:
            image = next(images)
            own = [row for row in truth["annotations"] if row["image_id"] == image.id]
            boxes = torch.tensor([row["bbox"] for row in own]).float()
            masks = torch.zeros(len(own), height, width, dtype=torch.bool)
            for mask, (x, y, w, h) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y : y + h, x : x + w] = True
            boxes[:, 2:] += boxes[:, :2]
            numbers = torch.tensor([labels[row["category_id"]] for row in own])
            rows.append(mask_rcnn.Detections(boxes, torch.ones(len(own)), numbers, masks))
        return rows

    images = iter(data.evaluate.batches.images)
    evaluation = replace(data.evaluate, detector=replace(data.evaluate.detector, detect=found))
    metrics = evaluation(torch.nn.Linear(1, 1))
    assert data.metric_name == "mask_ap"
    assert {name: value for name, value in metrics.items() if value != 1} == {}
    assert {"box_ap", "box_ap50", "box_ap75", "box_ap_small", "mask_ap", "mask_ap50", "mask_ap75"} <= set(metrics)
    assert "box_ap_large" not in metrics, "there are no large objects"


def reference_precision(truth: str, results: list[dict], kind: str) -> float:
    """What pycocotools says, used as its own example does."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(truth)
        evaluation = COCOeval(known, known.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def test_precision_on_real_annotations(shared_data):
    pytest.importorskip("pycocotools")
    file = shared_data / "coco_val158" / "instances_val158.json"
    if not file.is_file():
        pytest.skip("no COCO annotations")
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(file))
    images = sorted(known.imgs)
    rows = []
    for row in known.dataset["annotations"]:
        if not row["iscrowd"]:
            code = known.annToRLE(row)
            code = {"size": code["size"], "counts": code["counts"].decode()}
            rows.append(
                {**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0, "segmentation": code}
            )
    truth = json.loads(file.read_text())
    perfect = average_precisions(truth, rows, images, masks=True)
    assert {name: round(value, 9) for name, value in perfect.items()} == dict.fromkeys(perfect, 1.0)
    assert len(perfect) == 12
    generator = np.random.default_rng(0)
    changed = []
    for row in rows:
        shifted = [value + float(step) for value, step in zip(row["bbox"], generator.normal(0, 8, 4), strict=True)]
        shifted[2:] = [max(1.0, value) for value in shifted[2:]]
        category = row["category_id"] if generator.random() < 0.8 else 1
        other = rows[int(generator.integers(len(rows)))]["segmentation"]
        code = (
            row["segmentation"] if generator.random() < 0.7 or other["size"] != row["segmentation"]["size"] else other
        )
        score = float(generator.random())
        changed.append({**row, "bbox": shifted, "category_id": category, "score": score, "segmentation": code})
    found = average_precisions(truth, changed, images, masks=True)
    assert 0.05 < found["box_ap"] < 0.95
    for name, kind, key in (("box_ap", "bbox", "bbox"), ("mask_ap", "segm", "segmentation")):
        kept = [{part: row[part] for part in ("image_id", "category_id", "score", key)} for row in changed]
        assert found[name] == reference_precision(str(file), kept, kind)
    part = average_precisions(truth, rows, images[:20], masks=False)
    assert part["box_ap"] == pytest.approx(1.0)
    assert average_precisions(truth, [], images, masks=True)["mask_ap"] == 0.0


def test_real_images_are_prepared_and_measured(shared_data, folder):
    place = shared_data / "coco_val158"
    if not place.is_dir():
        pytest.skip("no COCO images")
    model = config(num_classes=81)
    values = {"root": str(place / "images"), "annotations": str(place / "instances_val158.json"), "samples": 3}
    data = dataset(folder, model=model, **values)
    module = detectors.mask_rcnn(0, num_classes=81)
    metrics = data.evaluate(module)
    assert 0 <= metrics["mask_ap"] < 0.2
    assert mask_rcnn.label_free_outputs(module, data.batches[0]).shape[0] == 2


def test_data_at_fault_is_named(folder, tmp_path, monkeypatch):
    def changed(**parts) -> str:
        truth = json.loads((folder / "instances.json").read_text())
        for key, change in parts.items():
            change(truth[key])
        (tmp_path / "x.json").write_text(json.dumps(truth))
        return refusal(DataError, dataset, folder, annotations=str(tmp_path / "x.json"))

    assert "gone.json do not exist" in refusal(DataError, dataset, folder, annotations="gone.json")
    assert "gone does not exist" in refusal(DataError, dataset, folder, root="gone/")
    (tmp_path / "no.json").write_text("{")
    assert "no.json are not JSON" in refusal(DataError, dataset, folder, annotations=str(tmp_path / "no.json"))
    (tmp_path / "no.json").write_text('{"images": []}')
    assert "'annotations'" in refusal(DataError, dataset, folder, annotations=str(tmp_path / "no.json"))
    assert "absent.png does not exist" in changed(images=lambda rows: rows[2].update(file_name="absent.png"))
    assert "4 categories and the model has 3 classes" in changed(
        categories=lambda rows: rows.append({"id": 11, "name": "cow"})
    )
    assert "category 77" in changed(annotations=lambda rows: rows[0].update(category_id=77))
    assert "image 99" in changed(annotations=lambda rows: rows[0].update(image_id=99))
    unboxed = {"image_id": 10, "category_id": 5}
    assert "image id 10 occurs twice" in changed(images=lambda rows: rows[1].update(id=10))
    assert "image id '10' is not an integer" in changed(images=lambda rows: rows[0].update(id="10"))
    assert "category id 5 occurs twice" in changed(categories=lambda rows: rows[0].update(id=5))
    assert "annotation 1 lacks 'area'" in changed(annotations=lambda rows: rows[0].pop("area"))
    assert "annotation number 2 lacks 'bbox'" in changed(annotations=lambda rows: rows.insert(1, unboxed))
    assert "'file_name'" in changed(images=lambda rows: rows[0].pop("file_name"))
    assert "7 samples are requested" in refusal(DataError, dataset, folder, samples=7)
    assert "choose box_ap or mask_ap" in refusal(DataError, dataset, folder, metric="accuracy")
    vit = ModelConfig(family="timm", name=zoo.VIT, checkpoint="unused")
    assert "detection" in refusal(DataError, dataset, folder, model=vit)
    (tmp_path / "images").mkdir()
    for file in (folder / "images").iterdir():
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    zoo.save_image(tmp_path / "images" / "2.png", 0, size=20)
    broken = dataset(folder, "calibration", root=str(tmp_path / "images"), batch_size=1)
    found = []
    for index in range(6):
        try:
            broken.batches[index]
        except DataError as error:
            found.append(str(error))
    assert len(found) == 2
    assert any("1.png cannot be decoded" in text for text in found)
    assert any("2.png is 20 × 20, but 60 × 40 in the annotations" in text for text in found)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocotools" else real(name))
    assert install_command("detection") in refusal(DataError, dataset, folder)
    assert dataset(folder, "calibration").samples == 6, "calibration needs no metric"


def test_categories_of_queries_are_matched_by_name():
    assert match_names({0: "N/A", 1: "cat", 2: "dog"}, {5: "dog", 7: "cat"}) == {2: 5, 1: 7}
    assert "'bird'" in refusal(DataError, match_names, {0: "cat"}, {1: "cat", 9: "bird"})


# -- whole runs ---------------------------------------------------------------------------------------------


def values(model: dict, tmp_path: Path, folder: Path, **changes) -> dict:
    place = {"source": "coco", "root": str(folder / "images"), "annotations": str(folder / "instances.json")}
    place["batch_size"] = 2
    return {
        "model": model,
        "data": {"calibration": {**place, "samples": 4}, "evaluation": place},
        "search": FAST,
        "store": f"file://{tmp_path}/store",
        **changes,
    }


def check_run(result: dict, model: ModelConfig, folder: Path, metric: str) -> None:
    """A run's result is complete, and its checkpoint rebuilds the model that was evaluated."""
    assert result["bytes"] <= result["budget_bytes"]
    assert 0 < result["nmse"] < 1
    assert result["metric"]["name"] == metric
    loaded, again = mlorq.load(result["checkpoint"]), mlorq.load(result["checkpoint"])
    float_model = load_model(model, str(folder))
    data = dataset(folder, model=model)
    with torch.no_grad():
        for one in data.batches:
            assert torch.equal(float_model.outputs(loaded, one), float_model.outputs(again, one))
    assert data.evaluate(loaded) == result["metrics"]["compressed"]
    assert data.evaluate(float_model.module) == result["metrics"]["float"]


MASK_RCNN = {"family": "detection", "name": detectors.NAME, "arguments": detectors.ARGUMENTS}
BEST = {
    "preset": "best",
    "search": {
        **FAST,
        "sum_ranks": [4],
        "sum_bits": [3],
        "include": ["backbone.body.layers_[12]*", "roi_heads.*", "rpn.*"],
    },
    "rounding": {"method": "block", "iterations": 3, "tuning": 2, "batch_size": 2},
}


@pytest.mark.parametrize("settings", few([{}, BEST], {}), ids=["quick", "best"])
def test_mask_rcnn_is_compressed_saved_and_loaded(settings, folder, tmp_path):
    # As published: background's rows of the predictors are zeros.
    torch.save(detectors.published_state(detectors.mask_rcnn(3), "mmdetection", DEPTHS), tmp_path / "published.pth")
    model = {**MASK_RCNN, "checkpoint": str(tmp_path / "published.pth")}
    result = zoo.run(tmp_path, values(model, tmp_path, folder, **settings))
    check_run(result, ModelConfig(**model), folder, "mask_ap")
    before = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    times = [path.stat().st_mtime_ns for path in before]
    again = zoo.run(tmp_path, values(model, tmp_path, folder, **settings))
    assert again["checkpoint"] == result["checkpoint"]
    assert sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file()) == before
    assert [path.stat().st_mtime_ns for path in before] == times, "nothing is computed twice"


@pytest.mark.parametrize("task", few(["object-detection", "instance-segmentation"], "object-detection"))
def test_transformers_detectors_are_compressed_saved_and_loaded(task, folder, tmp_path):
    detectors.save_transformers_detector(tmp_path / "model", task, 2)
    model = {"family": "transformers", "name": str(tmp_path / "model"), "task": task}
    result = zoo.run(tmp_path, values(model, tmp_path, folder))
    check_run(result, ModelConfig(**model), folder, "box_ap" if task == "object-detection" else "mask_ap")


def test_layers_that_a_module_keeps_in_a_list_are_replaced_there(tmp_path):
    detectors.save_transformers_detector(tmp_path, "instance-segmentation", 1)
    model = load_model(ModelConfig(family="transformers", name=str(tmp_path), task="instance-segmentation"))
    path = "model.transformer_module.decoder.mask_predictor.mask_embedder.0"
    block = model.module.get_submodule(path)
    changed = random_compressed(f"{path}.0", block.get_submodule("0"), Candidate("Q", bits=8), 1)
    replace_layers(model.module, {f"{path}.0": changed})
    assert isinstance(block.get_submodule("0"), CompressedLinear)
    assert block.layers[0] is block.get_submodule("0")


def test_a_detector_in_memory_is_saved_with_its_architecture(folder, tmp_path):
    model = load_model(config(), str(folder))
    save(checkpoint_files(copy.deepcopy(model.module), {"architecture": model.architecture}), tmp_path / "out")
    loaded = mlorq.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model.outputs(loaded, batch()), model.outputs(model.module, batch()))
