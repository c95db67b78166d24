"""Checkpoints of Mask R-CNN with a Swin backbone: three layouts, recognised by their keys, and one map between them.

``mlorq``: our own state dict. ``mmdetection``: mmdetection's. ``swin``: that of the repository
Swin-Transformer-Object-Detection, whose heads are mmdetection's and whose backbone is the original Swin's. The map
goes from our names to those of the file: every tensor of ours has exactly one source, and what a file has beyond that
is either named in ``UNUSED`` or an error.

Tensors that are not taken as they are:

- classes: in the published layouts background is last, in torchvision it is the first. ``fc_cls`` is rotated;
  ``fc_reg`` and ``conv_logits`` have no rows for it: rows of zeros are put before theirs (four of a box, one of a
  mask).
- patch merging: mmdetection unfolds a 2 × 2 patch to channels in the order (channel, row, column), the original and
  timm in the order (column, row, channel): the columns of ``reduction`` and its norm are permuted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from mlorq.errors import ModelError

Replacement = str | Callable[[re.Match[str]], str]

HEADS: list[tuple[str, Replacement]] = [
    (r"backbone\.norms\.(\d+)\.", r"backbone.norm\1."),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"rpn\.head\.conv\.0\.0\.", r"rpn_head.rpn_conv."),
    (r"rpn\.head\.cls_logits\.", r"rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", r"rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.fc6\.", r"roi_head.bbox_head.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", r"roi_head.bbox_head.shared_fcs.1."),
    (r"roi_heads\.box_predictor\.cls_score\.", r"roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", r"roi_head.bbox_head.fc_reg."),
    (r"roi_heads\.mask_head\.(\d+)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", r"roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", r"roi_head.mask_head.conv_logits."),
]


def _stage_before(place: str) -> Callable[[re.Match[str]], str]:
    """timm merges patches at a stage's entry, the others at the exit of the stage before."""
    return lambda match: f"backbone.{place}.{int(match[1]) - 1}.downsample."


BACKBONES: dict[str, list[tuple[str, Replacement]]] = {
    "mmdetection": [
        (r"backbone\.body\.patch_embed\.proj\.", r"backbone.patch_embed.projection."),
        (r"backbone\.body\.patch_embed\.norm\.", r"backbone.patch_embed.norm."),
        (r"backbone\.body\.layers_(\d+)\.blocks\.(\d+)\.norm", r"backbone.stages.\1.blocks.\2.norm"),
        (r"backbone\.body\.layers_(\d+)\.blocks\.(\d+)\.attn\.", r"backbone.stages.\1.blocks.\2.attn.w_msa."),
        (r"backbone\.body\.layers_(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0."),
        (r"backbone\.body\.layers_(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", r"backbone.stages.\1.blocks.\2.ffn.layers.1."),
        (r"backbone\.body\.layers_(\d+)\.downsample\.", _stage_before("stages")),
    ],
    "swin": [
        (r"backbone\.body\.patch_embed\.", r"backbone.patch_embed."),
        (r"backbone\.body\.layers_(\d+)\.blocks\.", r"backbone.layers.\1.blocks."),
        (r"backbone\.body\.layers_(\d+)\.downsample\.", _stage_before("layers")),
    ],
}

# Tensors of the published layouts that hold no weights, and why they are left.
UNUSED = {r"\.relative_position_index$": "an index that follows from the window size"}

BACKGROUND_ROWS = {"roi_heads.box_predictor.bbox_pred.": 4, "roi_heads.mask_predictor.mask_fcn_logits.": 1}
ROTATED = "roi_heads.box_predictor.cls_score."


def layout_of(keys: Iterable[str]) -> str | None:
    """``mlorq``, ``mmdetection`` or ``swin``; None for keys of no known layout."""
    listed = list(keys)
    marks = {"mlorq": "backbone.body.", "mmdetection": "backbone.stages.", "swin": "backbone.layers."}
    return next((name for name, mark in marks.items() if any(key.startswith(mark) for key in listed)), None)


def source_key(key: str, layout: str) -> str:
    """The name that one of our tensors has in a published layout.

    Raises:
        KeyError: there is none.
    """
    for pattern, replacement in [*BACKBONES[layout], *HEADS]:
        found, changed = re.subn(f"^{pattern}", replacement, key)
        if changed:
            return found
    raise KeyError(key)


def unused(key: str) -> str | None:
    """Why a tensor of a published checkpoint is left; None for one that is not known to be of no use."""
    return next((reason for pattern, reason in UNUSED.items() if re.search(pattern, key)), None)


def converted(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], checkpoint: str) -> dict[str, Tensor]:
    """A checkpoint of any of the layouts as our state dict.

    Args:
        state: the checkpoint's tensors.
        ours: the state dict of the model that they are for; only its names are looked at.
        checkpoint: what errors call the file.

    Raises:
        ModelError: the layout is not known, or a tensor is missing or has no place; it names the tensor.
    """
    layout = layout_of(state)
    if layout is None:
        raise ModelError(
            f"checkpoint {checkpoint} is of no known layout (mlorq, mmdetection, Swin-Transformer-Object-Detection): "
            f"its first tensor is {next(iter(state))!r}"
        )
    if layout == "mlorq":
        return dict(state)
    sources = {key: source_key(key, layout) for key in ours}
    for source in sources.values():
        if source not in state:
            raise ModelError(f"checkpoint {checkpoint} (layout {layout}) has no tensor {source!r}")
    places = set(sources.values())
    for key in state:
        if key not in places and unused(key) is None:
            raise ModelError(f"checkpoint {checkpoint} (layout {layout}) has a tensor {key!r} that has no place here")
    return {key: _convert(key, state[source], layout) for key, source in sources.items()}


def _convert(key: str, value: Tensor, layout: str) -> Tensor:
    if key.startswith(ROTATED):
        return value.roll(1, 0)
    for prefix, rows in BACKGROUND_ROWS.items():
        if key.startswith(prefix):
            return torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
    if layout == "mmdetection" and ".downsample." in key:
        return merging_order(value)
    return value


def merging_order(value: Tensor) -> Tensor:
    """Columns of a patch merging, ``(…, 4 · channels)``, from (channel, row, column) to (column, row, channel)."""
    if value.shape[-1] % 4:
        return value  # no patch merging of 2 × 2: the check of the shapes names it
    apart = value.reshape(*value.shape[:-1], -1, 2, 2)
    return apart.transpose(-1, -3).reshape(value.shape).contiguous()
