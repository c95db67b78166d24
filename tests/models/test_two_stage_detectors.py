"""Detectors whose queries are the best positions of a map: RT-DETR, RT-DETRv2, D-FINE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import mlorq
from mlorq.config.run import RunConfig
from mlorq.models import load_model
from mlorq.models.detector import side_by_side
from mlorq.models.layers import find_layers
from mlorq.models.task_outputs import DIRECTIONS
from mlorq.models.transformers_detection import box_outputs, by_position, chosen_positions
from tests import detectors, zoo
from tests.compressed import compressed, folder_of
from tests.long import few
from tests.models.test_transformers_tasks import dataset

SIDE = 64
LABELS = dict(enumerate(detectors.CATEGORIES.values()))
COMMON = {
    "id2label": LABELS,
    "label2id": {name: label for label, name in LABELS.items()},
    "num_queries": 8,
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 12, 16],
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 24,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_n_points": 2,
    "hidden_expansion": 0.5,
}


def resnet() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )


def hgnet() -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 12],
        stage_mid_channels=[4, 4, 4, 4],
        stage_out_channels=[8, 8, 12, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 12, 16],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_indices=[2, 3, 4],
    )


KINDS = {
    "rt_detr": lambda: transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(backbone_config=resnet(), **COMMON)
    ),
    "rt_detr_v2": lambda: transformers.RTDetrV2ForObjectDetection(
        transformers.RTDetrV2Config(backbone_config=resnet(), **COMMON)
    ),
    "d_fine": lambda: transformers.DFineForObjectDetection(
        transformers.DFineConfig(backbone_config=hgnet(), lqe_hidden_dim=8, max_num_bins=8, **COMMON)
    ),
}


def save(folder: Path, kind: str, seed: int = 0) -> nn.Module:
    """A detector with its image processor, and images with annotations."""
    module = zoo.randomised(KINDS[kind](), seed)
    module.save_pretrained(folder / "model")
    size = {"height": SIDE, "width": SIDE}
    transformers.RTDetrImageProcessor(size=size).save_pretrained(folder / "model")
    detectors.write_coco(folder)
    return module


def values() -> dict[str, Any]:
    place = {"source": "coco", "root": "images", "annotations": "instances.json", "batch_size": 3}
    return {
        "model": {"family": "transformers", "name": "./model", "task": "object-detection"},
        "data": {"calibration": place, "evaluation": place},
        "budget": "6bit",
        "search": zoo.FAST | {"include": ["model.decoder.layers.*", "model.enc_*"]},
    }


@pytest.mark.parametrize("kind", few(KINDS, "rt_detr"))
def test_checkpoints_compute_what_was_saved(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model = load_model(RunConfig.from_mapping(values(), str(tmp_path)).model, str(tmp_path))
    small = compressed(model.module)
    folder_of(tmp_path / "out", small, model.architecture)
    loaded = mlorq.load(tmp_path / "out")
    data = dataset(tmp_path, values())
    with torch.no_grad():
        assert torch.equal(model.outputs(loaded, data.batches[0]), model.outputs(small, data.batches[0]))
    measured = data.evaluate(loaded)
    assert measured == data.evaluate(small)
    assert 0 <= measured["box_ap"] <= 1


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_detectors_are_compressed_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    result = zoo.run(tmp_path, values())
    assert result["metric"]["name"] == "box_ap"
    assert 0 < result["nmse"] < 1
    location = result["checkpoint"].removeprefix("file://")
    loaded, again = mlorq.load(location), mlorq.load(location, weights="both")
    data = dataset(tmp_path, values())
    with torch.no_grad():
        assert torch.equal(box_outputs(loaded, data.batches[0]), box_outputs(again, data.batches[0]))
    assert data.evaluate(loaded) == result["metrics"]["compressed"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_layers_that_choose_positions_are_weighed(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model = load_model(RunConfig.from_mapping(values(), str(tmp_path)).model, str(tmp_path))
    names = {layer.name for layer in find_layers(model, dataset(tmp_path, values(), "calibration").batches[0]).layers}
    assert {"model.enc_score_head", "model.enc_bbox_head.layers.0", "model.enc_output.0"} <= names


def test_positions_are_those_of_the_model(tmp_path: Path) -> None:
    module = save(tmp_path, "rt_detr")
    batch = dataset(tmp_path, values()).batches[0]
    with torch.no_grad():
        found = module(**batch)
    positions = chosen_positions(found.enc_outputs_class, 8)
    taken = found.enc_outputs_class.gather(1, positions[..., None].expand(-1, -1, len(LABELS)))
    assert torch.equal(taken, found.enc_topk_logits)


def test_outputs_do_not_depend_on_the_order_of_queries(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 30, 5, generator=generator)
    positions = torch.stack([torch.randperm(400, generator=generator)[:30] for _ in range(2)])
    order = torch.randperm(30, generator=generator)
    first = by_position(values, positions, 400)
    assert first.shape == (2, DIRECTIONS, 5)
    torch.testing.assert_close(by_position(values[:, order], positions[:, order], 400), first)


def test_a_sketch_has_the_distances_of_the_map(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values, positions, and the map with zeros elsewhere."""
        values, positions = torch.randn(1, 30, 200, generator=generator), torch.randperm(400, generator=generator)[:30]
        whole = torch.zeros(400, 200)
        whole[positions] = values[0]
        return values, positions[None], whole

    (a, at, first), (b, where, second) = drawn(), drawn()
    found = (by_position(a, at, 400) - by_position(b, where, 400)).square().sum()
    assert float(found) == pytest.approx(float((first - second).square().sum()), rel=0.1)


def test_queries_that_trade_places_are_no_error(tmp_path: Path) -> None:
    module = KINDS["rt_detr"]()
    zoo.randomised(module, 0)
    batch = {"pixel_values": zoo.pixels(4, 1, 2 * SIDE)}
    with torch.no_grad():
        before, first = box_outputs(module, batch), module(**batch)
        generator = torch.Generator().manual_seed(5)
        for value in (one for one in module.parameters() if one.dim() > 1):
            value += 1e-3 * value.std() * torch.randn(value.shape, generator=generator)
        after, second = box_outputs(module, batch), module(**batch)
    number = [side_by_side([found.logits, found.pred_boxes]) for found in (first, second)]
    assert error(*number) > 1e-2, "compared by their number, they are"
    assert error(before, after) < 1e-4


def error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())
