"""Detectors from transformers: boxes from queries (DETR and similar), masks from queries (MaskFormer, Mask2Former).

f(x) is the output of the queries, since their number is fixed and they need no suppression: class logits and boxes, or
class logits and mask logits at a lattice of positions (METHOD 3). Both kinds have equal weight (``side_by_side``). The
model's image processor prepares images and pads a batch to one size; the lattice covers the unpadded part only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import DataError, ModelError
from mlorq.models.batches import Batch
from mlorq.models.detector import Detections, Detector, Size, at_points, side_by_side
from mlorq.models.hub_names import load_problem
from mlorq.models.image_processor import load_processor
from mlorq.models.task_outputs import directions
from mlorq.models.transformers import TransformersSettings

POINTS = 12  # lattice points of the masks in f(x), per side
DETECTIONS = 100  # maximum per image


def box_outputs(module: nn.Module, batch: Batch) -> Tensor:
    """f(x) of a box detector: class logits and boxes of all queries, ``(samples, outputs)``.

    For detectors whose queries are the best positions of a map (RT-DETR, D-FINE): probabilities of the classes, and
    boxes times the largest probability, of the queries and of the positions that they come from, sketched by position.
    Queries at the end of the list come and go with small errors, and hardly count.
    """
    found = module(**batch)
    if not chooses_positions(module):
        return side_by_side([found.logits, found.pred_boxes])
    positions = chosen_positions(found.enc_outputs_class, found.logits.shape[1])
    kinds = []
    for logits, boxes in ((found.logits, found.pred_boxes), (found.enc_topk_logits, found.enc_topk_bboxes)):
        probabilities = logits.float().sigmoid()
        kinds += [probabilities, probabilities.amax(-1, keepdim=True) * boxes.float()]
    return side_by_side([by_position(kind, positions, found.enc_outputs_class.shape[1]) for kind in kinds])


def chooses_positions(module: nn.Module) -> bool:
    """Whether the queries of a detector are the best positions of a map: RT-DETR, D-FINE and similar."""
    return hasattr(getattr(module, "model", None), "enc_score_head")


def chosen_positions(scores: Tensor, queries: int) -> Tensor:
    """The positions that become queries, ``(samples, queries)`` int64, the best first.

    Args:
        scores: class logits of all positions, ``(samples, positions, classes)``.
        queries: number of queries.
    """
    return torch.topk(scores.max(-1).values, queries, dim=1).indices


def by_position(values: Tensor, positions: Tensor, size: int) -> Tensor:
    """A sketch of values of queries at their positions, ``(samples, directions, entries)``.

    The order of the queries is that of scores: a small error swaps neighbours, and would count as large if queries were
    compared by their number. Here a query counts at its position on the map, and one that is not chosen counts as
    zeros. Random signs stand for the ``size`` positions, as in ``sketched_logits``.

    Args:
        values: ``(samples, queries, entries)``.
        positions: ``(samples, queries)``.
        size: number of positions.
    """
    signs = directions(size).to(values)[positions]  # (samples, queries, directions)
    return signs.transpose(1, 2) @ values


def mask_outputs(module: nn.Module, batch: Batch) -> Tensor:
    """f(x) of a mask detector: class logits of all queries, and mask logits at a lattice, ``(samples, outputs)``."""
    found = module(**batch)
    maps = found.masks_queries_logits
    parts = _parts(batch)
    sizes = [
        tuple(max(1, round(part * size)) for part, size in zip(row, maps.shape[-2:], strict=True)) for row in parts
    ]
    return side_by_side([found.class_queries_logits, at_points(maps, sizes, POINTS)])


def mark_samples(module: nn.Module) -> None:
    """Set ``samples_axis = 1`` on layers whose input has tokens first and samples second: Mask2Former's decoder."""
    for child in module.modules():
        if type(child).__name__ == "Mask2FormerMaskedAttentionDecoderLayer":
            for layer in (child.fc1, child.fc2):
                setattr(layer, "samples_axis", 1)  # noqa: B010 - not an attribute of its type


def detector(settings: TransformersSettings, location: str) -> Detector:
    """Preprocessing and inference of a detector.

    Args:
        settings: settings of the model.
        location: folder or hub name of the model.

    Raises:
        ModelError: its image processor cannot be loaded.
    """
    from transformers import AutoConfig

    preparation = load_processor(location, settings.name or "", ("pixel_values", "pixel_mask"))
    try:
        named = AutoConfig.from_pretrained(location).id2label
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        text = load_problem(error, location)
        raise ModelError(f"model {settings.name!r}: its configuration cannot be loaded: {text}") from error

    def boxes(module: nn.Module, batch: Batch, originals: Sequence[Size]) -> list[Detections]:
        outputs = module(**batch)
        sizes = torch.tensor(list(originals), device=outputs.logits.device)
        rows = preparation.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        found = []
        for row in rows:
            best = row["scores"].float().sort(descending=True, stable=True).indices[:DETECTIONS]
            found.append(Detections(*(row[name][best] for name in ("boxes", "scores", "labels"))))
        return found

    masks = settings.task == "instance-segmentation"
    return Detector(
        preparation.prepare,
        masks_of if masks else boxes,
        lambda names: match_names({int(label): name for label, name in named.items()}, names),
        {**preparation.described, "points": POINTS},
        masks,
    )


def masks_of(module: nn.Module, batch: Batch, originals: Sequence[Size]) -> list[Detections]:
    """Instance segmentation as in Mask2Former (arXiv 2112.01527): the best pairs of query and class, with masks.

    The score is the probability of the class times the mean probability of the pixels in the mask. Each box encloses
    its mask.

    Args:
        module: a MaskFormer or Mask2Former.
        batch: prepared images.
        originals: height and width of each original image.
    """
    found = module(**batch)
    padded = batch["pixel_values"].shape[-2:]
    result = []
    for logits, maps, part, size in zip(
        found.class_queries_logits, found.masks_queries_logits, _parts(batch), originals, strict=True
    ):
        scores = logits.float().softmax(-1)[:, :-1]  # the last class is "no object"
        best = scores.flatten().topk(min(DETECTIONS, scores.numel()))
        queries, labels = best.indices // scores.shape[1], best.indices % scores.shape[1]
        height, width = (max(1, round(share * side)) for share, side in zip(part, padded, strict=True))
        whole = _resized(maps[queries].float(), tuple(padded))[:, :height, :width]
        whole = _resized(whole, size)
        masks = whole > 0
        sure = (whole.sigmoid() * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
        kept = masks.any(2).any(1)
        boxes = _boxes(masks[kept])
        result.append(Detections(boxes, (best.values * sure)[kept], labels[kept], masks[kept]))
    return result


def match_names(labels: Mapping[int, str], categories: Mapping[int, str]) -> dict[int, int]:
    """``{label: category id}`` of the model's classes and the annotations' categories with equal names.

    Args:
        labels: ``{label: name}`` of the model.
        categories: ``{category id: name}`` of the annotations.

    Raises:
        DataError: the model has no class with the name of a category.
    """
    by_name = {name: label for label, name in sorted(labels.items(), reverse=True)}
    for category, name in categories.items():
        if name not in by_name:
            raise DataError(f"the annotations have a category {name!r} ({category}), but the model has no such class")
    return {by_name[name]: category for category, name in categories.items()}


def _parts(batch: Batch) -> list[tuple[float, float]]:
    """Unpadded part of the height and width of each image in a batch, as fractions."""
    mask = batch.get("pixel_mask")
    if mask is None:
        return [(1.0, 1.0)] * len(batch["pixel_values"])
    height, width = mask.shape[-2:]
    filled = mask.bool()
    return [(int(row.any(1).sum()) / height, int(row.any(0).sum()) / width) for row in filled]


def _resized(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]


def _boxes(masks: Tensor) -> Tensor:
    """Bounding boxes of non-empty masks, ``(n, 4)``; right and bottom edges are exclusive."""
    edges = []
    for axis in (1, 2):
        along = masks.any(axis)  # columns, then rows
        positions = torch.arange(along.shape[1], device=masks.device)
        first = torch.where(along, positions, along.shape[1]).min(1).values if len(along) else positions[:0]
        last = torch.where(along, positions, -1).max(1).values if len(along) else positions[:0]
        edges.append((first, last + 1))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()
