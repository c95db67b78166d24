"""Tiny detectors with random weights, COCO data for them, and checkpoints in the layouts of published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlorq.models import rebuild
from tests import zoo

NAME = "mask_rcnn_swin_tiny"
ARGUMENTS = {
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 3,
    "fpn_channels": 8,
    "box_channels": 12,
    "mask_channels": 6,
    "num_classes": 4,
    "min_size": 48,
    "max_size": 80,
    "score_threshold": 0.0,
    "detections": 8,
}
CATEGORIES = {2: "cat", 5: "dog", 9: "bird"}  # not contiguous, as COCO's are


def mask_rcnn(seed: int = 0, **changes: Any) -> nn.Module:
    return zoo.randomised(rebuild({"family": "detection", "name": NAME, "arguments": {**ARGUMENTS, **changes}}), seed)


def write_coco(folder: Path, images: int = 6) -> dict[str, Any]:
    """Images of several shapes under ``images/`` with two or three rectangles each, and ``instances.json``."""
    generator = np.random.default_rng(7)
    rows: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    rows["categories"] = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    for index in range(images):
        zoo.save_image(folder / "images" / f"{index}.png", index, size=60)
        width, height = (60, 40) if index % 3 else (40, 60)
        from PIL import Image

        Image.open(folder / "images" / f"{index}.png").resize((width, height)).save(folder / "images" / f"{index}.png")
        rows["images"].append({"id": 10 + index, "file_name": f"{index}.png", "height": height, "width": width})
        for _ in range(2 + index % 2):
            w, h = (int(size) for size in generator.integers(8, 30, 2))
            x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
            rows["annotations"].append(
                {
                    "id": len(rows["annotations"]) + 1,
                    "image_id": 10 + index,
                    "category_id": int(generator.choice(list(CATEGORIES))),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    (folder / "instances.json").write_text(json.dumps(rows))
    return rows


def save_transformers_detector(folder: Path, task: str, seed: int = 0) -> nn.Module:
    """The folder of a tiny DETR (``object-detection``) or Mask2Former with Swin (``instance-segmentation``)."""
    import transformers as library

    labels = dict(enumerate(CATEGORIES.values()))
    named = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}, "num_queries": 5}
    size = {"size": {"shortest_edge": 32, "longest_edge": 64}}
    if task == "object-detection":
        body = library.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        narrow = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        config = library.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=body,
            d_model=16,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            **narrow,
            **named,
        )
        module, processor = library.DetrForObjectDetection(config), library.DetrImageProcessor(**size)
    else:
        stages = [f"stage{index}" for index in (1, 2, 3, 4)]
        body = library.SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=3, image_size=32, out_features=stages
        )
        wide = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
        config = library.Mask2FormerConfig(
            backbone_config=body,
            encoder_layers=1,
            decoder_layers=2,
            encoder_feedforward_dim=24,
            dim_feedforward=24,
            num_attention_heads=2,
            **wide,
            **named,
        )
        module = library.Mask2FormerForUniversalSegmentation(config)
        processor = library.Mask2FormerImageProcessor(size_divisor=32, **size)
    zoo.randomised(module, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return module


# -- published layouts, written down from their own code and not from our map --------------------------------


def published_keys(layout: str, depths: tuple[int, ...]) -> list[str]:
    """Every key of a published checkpoint: ``mmdetection`` or ``swin`` (Swin-Transformer-Object-Detection)."""
    both = ("weight", "bias")
    new = layout == "mmdetection"
    stage, attention = ("stages", "attn.w_msa") if new else ("layers", "attn")
    inside = ["ffn.layers.0.0", "ffn.layers.1"] if new else ["mlp.fc1", "mlp.fc2"]
    keys = [f"backbone.patch_embed.{name}.{end}" for name in ("projection" if new else "proj", "norm") for end in both]
    for level, depth in enumerate(depths):
        for block in range(depth):
            place = f"backbone.{stage}.{level}.blocks.{block}"
            tables = ("relative_position_bias_table", "relative_position_index")
            keys += [f"{place}.{attention}.{table}" for table in tables]
            modules = ["norm1", "norm2", f"{attention}.qkv", f"{attention}.proj", *inside]
            keys += [f"{place}.{name}.{end}" for name in modules for end in both]
        keys += [f"backbone.norm{level}.{end}" for end in both]
        if level + 1 < len(depths):
            keys += [f"backbone.{stage}.{level}.downsample.{name}" for name in ("norm.weight", "norm.bias")]
            keys += [f"backbone.{stage}.{level}.downsample.reduction.weight"]
    heads = [f"neck.{name}.{level}.conv" for name in ("lateral_convs", "fpn_convs") for level in range(len(depths))]
    heads += [f"rpn_head.{name}" for name in ("rpn_conv", "rpn_cls", "rpn_reg")]
    heads += [f"roi_head.bbox_head.{name}" for name in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")]
    heads += [f"roi_head.mask_head.{name}" for name in (*(f"convs.{i}.conv" for i in range(4)), "upsample")]
    return keys + [f"{name}.{end}" for name in [*heads, "roi_head.mask_head.conv_logits"] for end in both]


def published_state(module: nn.Module, layout: str, depths: tuple[int, ...]) -> dict[str, Tensor]:
    """The weights of one of our modules as a published checkpoint would hold them, one assignment a key."""
    model: Any = module
    pyramid, rpn, heads = model.backbone, model.rpn.head, model.roi_heads
    state: dict[str, Tensor] = {}
    for key in published_keys(layout, depths):
        parts = key.split(".")
        end = parts[-1]
        if key.startswith("backbone.patch_embed."):
            value = getattr(getattr(pyramid.body.patch_embed, "proj" if "proj" in parts[2] else "norm"), end)
        elif key.startswith("backbone.norm"):
            value = getattr(pyramid.norms[int(parts[1][4:])], end)
        elif ".downsample." in key:
            value = getattr(
                getattr(pyramid.body, f"layers_{int(parts[2]) + 1}").downsample.get_submodule(parts[4]), end
            )
            if layout == "mmdetection":
                value = unfold_order(value)
        elif key.startswith("backbone."):
            block = getattr(pyramid.body, f"layers_{parts[2]}").blocks[int(parts[4])]
            if "attn" in parts:
                value = getattr(block.attn, end) if "relative" in end else getattr(getattr(block.attn, parts[-2]), end)
            elif parts[5] in ("ffn", "mlp"):
                value = getattr(block.mlp.fc1 if parts[-2] in ("0", "fc1") else block.mlp.fc2, end)
            else:
                value = getattr(getattr(block, parts[5]), end)
        elif key.startswith("neck."):
            layers = pyramid.fpn.inner_blocks if parts[1] == "lateral_convs" else pyramid.fpn.layer_blocks
            value = getattr(layers[int(parts[2])][0], end)
        elif key.startswith("rpn_head."):
            known = {"rpn_conv": rpn.conv[0][0], "rpn_cls": rpn.cls_logits, "rpn_reg": rpn.bbox_pred}
            value = getattr(known[parts[1]], end)
        elif "shared_fcs" in parts:
            value = getattr(heads.box_head.fc6 if parts[3] == "0" else heads.box_head.fc7, end)
        elif "fc_cls" in parts:  # background is last there
            ours = getattr(heads.box_predictor.cls_score, end)
            value = torch.cat([ours[1:], ours[:1]])
        elif "fc_reg" in parts:
            value = getattr(heads.box_predictor.bbox_pred, end)[4:]
        elif "convs" in parts:
            value = getattr(heads.mask_head[int(parts[3])][0], end)
        elif "upsample" in parts:
            value = getattr(heads.mask_predictor.conv5_mask, end)
        else:
            value = getattr(heads.mask_predictor.mask_fcn_logits, end)[1:]
        state[key] = value.detach().clone()
    return state


def unfold_order(value: Tensor) -> Tensor:
    """Columns of a patch merging in the order of ``nn.Unfold`` (channel, row, column), picked one by one."""
    channels = value.shape[-1] // 4
    found = torch.empty_like(value)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                found[..., channel * 4 + row * 2 + column] = value[..., (column * 2 + row) * channels + channel]
    return found
