"""Conversion of Mask R-CNN checkpoints with a Swin backbone from three layouts, recognised by their keys.

``mlorq`` is our state dict. ``mmdetection`` is that of mmdetection. ``swin`` is that of the repository
Swin-Transformer-Object-Detection: heads as in mmdetection, backbone as in the original Swin. Names are mapped from ours
to those of the file: each of our tensors has exactly one source, and any other tensor in the file must be listed in
``UNUSED``, else it is an error.

Tensors that are changed by the conversion:

- Classes: background is last in the published layouts and first in torchvision. ``fc_cls`` is rotated; ``fc_reg`` and
  ``conv_logits`` have no rows for background, so rows of zeros are prepended (four per box, one per mask).
- Patch merging: mmdetection unfolds a 2 × 2 patch to channels in the order (channel, row, column), the original Swin
  and timm in the order (column, row, channel): the columns of ``reduction`` and the entries of its norm are permuted.
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


def _stage_before(stages: str) -> Callable[[re.Match[str]], str]:
    """Name of a patch merging: timm has it at the start of a stage, the others at the end of the previous stage."""
    return lambda match: f"backbone.{stages}.{int(match[1]) - 1}.downsample."


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

# Tensors of the published layouts that are not loaded, and the reasons.
UNUSED = {r"\.relative_position_index$": "an index determined by the window size"}

BACKGROUND_ROWS = {"roi_heads.box_predictor.bbox_pred.": 4, "roi_heads.mask_predictor.mask_fcn_logits.": 1}
ROTATED = "roi_heads.box_predictor.cls_score."


def layout_of(keys: Iterable[str]) -> str | None:
    """The layout of a checkpoint: ``mlorq``, ``mmdetection`` or ``swin``; None if it is unknown."""
    listed = list(keys)
    marks = {"mlorq": "backbone.body.", "mmdetection": "backbone.stages.", "swin": "backbone.layers."}
    return next((name for name, mark in marks.items() if any(key.startswith(mark) for key in listed)), None)


def source_key(key: str, layout: str) -> str:
    """Name of one of our tensors in a published layout.

    Raises:
        KeyError: the layout has no such tensor.
    """
    for pattern, replacement in [*BACKBONES[layout], *HEADS]:
        found, changed = re.subn(f"^{pattern}", replacement, key)
        if changed:
            return found
    raise KeyError(key)


def unused(key: str) -> str | None:
    """Reason why a tensor of a published checkpoint is not loaded; None if it is not in ``UNUSED``."""
    return next((reason for pattern, reason in UNUSED.items() if re.search(pattern, key)), None)


def converted(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], checkpoint: str) -> dict[str, Tensor]:
    """A checkpoint of any known layout as our state dict.

    Args:
        state: the tensors of the checkpoint.
        ours: state dict of the model; only its names are read.
        checkpoint: path of the file, for messages.

    Raises:
        ModelError: the layout is unknown, or a tensor is missing or unexpected; the message names the tensor.
    """
    layout = layout_of(state)
    if layout is None:
        raise ModelError(
            f"checkpoint {checkpoint} has an unknown layout: its first tensor is {next(iter(state))!r}; use one of "
            "mlorq, mmdetection or Swin-Transformer-Object-Detection"
        )
    if layout == "mlorq":
        return dict(state)
    sources = {key: source_key(key, layout) for key in ours}
    for source in sources.values():
        if source not in state:
            raise ModelError(f"checkpoint {checkpoint} (layout {layout}) has no tensor {source!r}")
    used = set(sources.values())
    for key in state:
        if key not in used and unused(key) is None:
            raise ModelError(f"checkpoint {checkpoint} (layout {layout}) has an unexpected tensor {key!r}")
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
        return value  # not a 2 × 2 patch merging: the check of shapes reports it
    apart = value.reshape(*value.shape[:-1], -1, 2, 2)
    return apart.transpose(-1, -3).reshape(value.shape).contiguous()
