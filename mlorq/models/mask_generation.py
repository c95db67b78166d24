"""Segment Anything and its like from transformers: masks of the objects that prompts point at; a prompt is a box.

A calibration sample is an image with one box, so that the layers of the mask decoder have one row per sample, as those
of the image encoder have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.hub_names import load_problem
from mlorq.models.image_processor import NOT_PREPROCESSING
from mlorq.models.segmentation import on_lattice

if TYPE_CHECKING:
    from mlorq.models.batches import Batch
    from mlorq.models.transformers import TransformersSettings

VALUES = 2**15  # most numbers of f(x) per sample, of the embedding and of the masks each
SIZES = ("original_sizes", "reshaped_input_sizes")  # of images, what the processor needs to undo its resizing


@dataclass(frozen=True)
class Prompted:
    """Preparation of images with boxes, and the masks that a model finds in them.

    Attributes:
        prepare: ``prepare(images, boxes)`` makes a batch of RGB images (PIL) and equally many boxes of each, ``(left,
            top, right, bottom)`` in its pixels; and what ``masks`` needs to undo the resizing.
        masks: ``masks(module, batch, sizes)`` returns for each image its boxes' masks, ``(boxes, height, width)`` bool
            in pixels of the original image: of each box the one of the highest predicted quality.
        described: settings of ``prepare`` as JSON values; part of the key of the data.
    """

    prepare: Callable[[Sequence[Any], Sequence[Sequence[Sequence[float]]]], tuple[Batch, dict[str, Any]]]
    masks: Callable[[nn.Module, Batch, Mapping[str, Any]], list[Tensor]]
    described: dict[str, Any]


def prompted_outputs(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a model that masks what a box encloses: embedding, mask logits and qualities, ``(samples, outputs)``.

    Mask logits alone would weigh the image encoder by one object of an image. Its embedding serves every prompt, and
    is compared beside them. The two have different scales, of some hundredths and of tens: each sample's embedding and
    each of its masks are divided by their norms, so that both kinds weigh the same. A mask, which is where its logits
    are positive, does not depend on that, and the embedding comes from a normalisation. The qualities, estimates of
    IoU by which a mask is chosen, are about 1 as they are. A lattice of positions stands for large maps, as in
    ``map_logits``.
    """
    embedding, found = _encoded(module, batch)
    masks = on_lattice(found.pred_masks.float().flatten(1, 2), VALUES)
    parts = [
        F.normalize(on_lattice(embedding.float(), VALUES).flatten(1), dim=1),
        (F.normalize(masks.flatten(2), dim=2) / masks.shape[1] ** 0.5).flatten(1),
        found.iou_scores.float().flatten(1) / found.iou_scores[0].numel() ** 0.5,
    ]
    return torch.cat(parts, dim=1)


def _encoded(module: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The embedding of each image, ``(samples, channels, height, width)``, and the outputs of the model."""
    if not hasattr(module, "vision_encoder"):
        raise ModelError(f"{type(module).__name__} has no image encoder: use source custom")
    kept: list[Any] = []
    # The model's own methods for embeddings have no gradient in some classes, and return other things in others.
    handle = module.vision_encoder.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        found = module(**batch)
    finally:
        handle.remove()
    if (own := getattr(found, "image_embeddings", None)) is not None:  # SAM 2: of three sizes, the last one is attended
        return own[-1], found
    return kept[-1].last_hidden_state, found


def prompted(settings: TransformersSettings, location: str) -> Prompted:
    """Preparation and inference of a model.

    Args:
        settings: settings of the model.
        location: its folder or hub name.

    Raises:
        ModelError: its processor cannot be loaded, or makes no masks of boxes.
    """
    from transformers import AutoProcessor

    name = settings.name
    try:
        processor: Any = AutoProcessor.from_pretrained(location)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"model {name!r}: its processor cannot be loaded: {load_problem(error, location)}") from error
    images_of = getattr(processor, "image_processor", processor)
    if not hasattr(images_of, "post_process_masks"):
        raise ModelError(f"model {name!r}: its processor, {type(images_of).__name__}, makes no masks of boxes")

    def prepare(images: Sequence[Any], boxes: Sequence[Sequence[Sequence[float]]]) -> tuple[Batch, dict[str, Any]]:
        pictures = [image.convert("RGB") for image in images]
        given = [[list(map(float, box)) for box in row] for row in boxes]
        found = processor(images=pictures, input_boxes=given, return_tensors="pt")
        batch = {"pixel_values": found["pixel_values"], "input_boxes": found["input_boxes"].float()}
        return batch, {key: found[key] for key in SIZES if key in found}

    def masks(module: nn.Module, batch: Batch, sizes: Mapping[str, Any]) -> list[Tensor]:
        found = module(**batch)
        best = found.iou_scores.argmax(-1)  # (samples, boxes)
        places = best[..., None, None, None].expand(-1, -1, 1, *found.pred_masks.shape[-2:])
        chosen = found.pred_masks.gather(2, places).float()
        rows: list[Tensor] = []
        for index, row in enumerate(chosen):  # one by one: images have sizes of their own
            own = {key: value[index : index + 1] for key, value in sizes.items()}
            rows.append(processor.post_process_masks([row], *own.values())[0][:, 0])
        return rows

    described = json.loads(images_of.to_json_string())
    described = {key: value for key, value in described.items() if key not in NOT_PREPROCESSING}
    return Prompted(prepare, masks, described)
