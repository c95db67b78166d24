"""Mask R-CNN with a Swin backbone: timm's Swin, torchvision's pyramid, proposals and heads, published weights.

The whole detector is compressed. Its f(x) for the label-free loss is one tensor of fixed width per sample,
differentiable in every weight (``label_free_outputs``; METHOD 3):

- proposal head: logits and box shifts of every anchor, at a lattice of positions of every level of the pyramid;
- box head: class logits and box shifts of a fixed pyramid of regions of the image (the whole image, its quarters, …);
- mask head: mask logits of all classes for the same regions, at a few positions.

The regions are fixed because the proposals of the float and the compressed model differ in number and order, and
non-maximum suppression has no gradient. Fixed regions evaluate every head at the same position in both models, reach
every level of the pyramid, and are mostly background, as images are. The regions of a sample are consecutive rows of
the heads' input, so that statistics per sample are possible.

The images of a batch are resized one by one and padded to one size (right and bottom, after normalisation, to a
multiple of 32), as in training. The backbone sees the padding, as in training; f(x) excludes padded positions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlorq.errors import DataError, ModelError, one_line
from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch
from mlorq.models.detection import NAME
from mlorq.models.detection_keys import converted
from mlorq.models.detector import Detections, Detector, Size, at_points, side_by_side, spread_points
from mlorq.models.plain import check_keys
from mlorq.models.state_dict import fill_weights, read_state_dict

BACKBONES: dict[str, dict[str, Any]] = {
    "mask_rcnn_swin_tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "mask_rcnn_swin_small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
}
TIMM_NAME = "swin_tiny_patch4_window7_224"  # class of all backbones; their sizes are arguments

# Keys of ``model.arguments``, with the values of the published models.
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "fpn_channels": 256,
    "box_channels": 1024,
    "mask_channels": 256,
    "num_classes": 81,  # including background
    "min_size": 800,  # pixels of the short side of an image
    "max_size": 1333,  # maximum pixels of the long side
    "proposals": 1000,
    "score_threshold": 0.05,
    "detections": 100,  # maximum per image
}
MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)
PADDED_TO = 32

POINTS = 12  # lattice points of the proposal head's outputs, per side and level
# Regions: side of the image / side of the region, and number of regions per side. For images of the published size
# (800 × 1333) they are pooled from levels 5, 5, 4, 3 and 2 of the pyramid.
REGIONS = ((1, 1), (2, 2), (4, 4), (8, 6), (16, 6))
MASK_POINTS = 2  # positions in a mask, per side; the mask head's four convolutions cover their neighbourhood
MASK_THRESHOLD = 0.5


def load(name: str, arguments: Mapping[str, Any], checkpoint: str, dtype: str) -> FloatModel:
    """The detector with the weights of a checkpoint in any layout of ``detection_keys``.

    Args:
        name: key of ``BACKBONES``.
        arguments: values that replace those of ``ARGUMENTS``.
        checkpoint: path or URI of the weights.
        dtype: name of the dtype that the model runs in.

    Raises:
        ModelError: the name or an argument is unknown, or the weights are missing or do not fit.
    """
    architecture = {"family": NAME, "name": name, "arguments": dict(arguments)}
    module = rebuild(architecture)
    fill_weights(module, converted(read_state_dict(checkpoint), module.state_dict(), checkpoint), checkpoint)
    as_dtype = getattr(torch, dtype)
    return FloatModel(
        module.to(as_dtype), NAME, architecture, label_free_outputs, blocks=block_names(module), dtype=as_dtype
    )


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The module of an architecture, with weights yet to be loaded.

    It is called as torchvision's Mask R-CNN: on a list of images ``(3, height, width)`` with values in [0, 1] it
    returns boxes, labels, scores and masks in pixels of the images.

    Raises:
        CheckpointError: the description has other keys.
        ModelError: the name or an argument is unknown, or an argument has another type.
    """
    check_keys(architecture, {"family": str, "name": str, "arguments": dict})
    values = settings(architecture["name"], architecture["arguments"])
    for key, value in values.items():
        if not _is_like(value, ARGUMENTS[key]):
            raise ModelError(f"detector {architecture['name']!r}: invalid argument {key}: {value!r:.60}")
    try:
        return _build(values)
    except (TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:
        raise ModelError(f"detector {architecture['name']!r}: invalid arguments: {one_line(error)}") from error


def _is_like(value: Any, published: Any) -> bool:
    """Whether a value of an argument has the type of the published one: a number, or a list of integers."""
    if isinstance(published, list):
        return isinstance(value, (list, tuple)) and all(_is_like(item, 0) for item in value)
    numbers = (int, float) if isinstance(published, float) else (int,)
    return isinstance(value, numbers) and not isinstance(value, bool)


def settings(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a model: the given ones, and the published values of the others.

    Raises:
        ModelError: the name or an argument is unknown.
    """
    if name not in BACKBONES:
        raise ModelError(f"unknown detector {name!r}; known: {', '.join(BACKBONES)}")
    for key in arguments:
        if key not in ARGUMENTS:
            raise ModelError(f"detector {name!r}: unknown argument {key!r}; known: {', '.join(ARGUMENTS)}")
    return {**ARGUMENTS, **BACKBONES[name], **arguments}


def block_names(module: nn.Module) -> list[str]:
    """Names of the Swin blocks of all stages, in execution order.

    The forward pass cannot be entered at a block, since patches are merged between stages and the pyramid reads every
    stage; the blocks are used for block reconstruction only.
    """
    from mlorq.models.detection_parts import PadFirstBlock

    return [name for name, child in module.named_modules() if isinstance(child, PadFirstBlock)]


def label_free_outputs(module: nn.Module, batch: Batch) -> Tensor:
    """f(x), ``(samples, outputs)`` float32; see the docstring of this file.

    Args:
        module: a torchvision Mask R-CNN.
        batch: ``pixel_values`` ``(samples, 3, height, width)``, and ``image_sizes`` ``(samples, 2)``, the height and
            width before padding.
    """
    model: Any = module
    pixels, sizes = batch["pixel_values"], _sizes(batch)
    features = model.backbone(pixels)
    kinds = []
    for maps in model.rpn.head(list(features.values())):
        kinds.append(torch.stack([at_points(map_, _cells(sizes, pixels, map_), POINTS) for map_ in maps], dim=1))
    boxes = [regions(size).to(pixels.device) for size in sizes]
    heads = model.roi_heads
    logits, shifts = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, sizes)))
    rows, columns = (spread_points(size, MASK_POINTS) for size in masks.shape[-2:])
    # Background has no box and no mask.
    per_region = [logits, shifts[:, 4:], masks[:, 1:, rows][..., columns]]
    return side_by_side([*kinds, *(kind.reshape(len(sizes), -1) for kind in per_region)])


def regions(size: Size) -> Tensor:
    """The regions of f(x), ``(93, 4)`` in pixels: the whole image, its quarters, and evenly spaced smaller ones."""
    height, width = size
    found = []
    for smaller, number in REGIONS:
        starts = [(index + 0.5) / number - 0.5 / smaller for index in range(number)]
        for top in starts:
            for left in starts:
                edges = (left, top, left + 1 / smaller, top + 1 / smaller)
                found.append([edge * side for edge, side in zip(edges, (width, height) * 2, strict=True)])
    return torch.tensor(found)


def detector(name: str, arguments: Mapping[str, Any]) -> Detector:
    """Preprocessing and inference as in torchvision.

    Args:
        name: key of ``BACKBONES``.
        arguments: values that replace those of ``ARGUMENTS``.

    Raises:
        ModelError: the name or an argument is unknown.
    """
    values = settings(name, arguments)
    transform = _transform(values)

    def prepare(images: Sequence[Any]) -> Batch:
        arrays = [np.array(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
        found, _ = transform([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
        return {"pixel_values": found.tensors, "image_sizes": torch.tensor(found.image_sizes)}

    def categories(names: Mapping[int, str]) -> dict[int, int]:
        wanted = values["num_classes"] - 1
        if len(names) != wanted:
            raise DataError(
                f"the annotations have {len(names)} categories and the model has {wanted} classes: the numbers must "
                "be equal"
            )
        return {label: category for label, category in enumerate(sorted(names), 1)}

    described = preprocessing(name, arguments)
    described |= {"points": POINTS, "regions": REGIONS, "mask_points": MASK_POINTS}
    return Detector(prepare, detect, categories, described, masks=True)


def preprocessing(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the preprocessing: sizes of resized images, normalisation, and the multiple of the padded size."""
    values = settings(name, arguments)
    sizes = {"min_size": values["min_size"], "max_size": values["max_size"]}
    return sizes | {"mean": MEAN, "std": STD, "padded_to": PADDED_TO}


def random_images(name: str, arguments: Mapping[str, Any], samples: int) -> Batch:
    """A batch as from ``Detector.prepare``, of square images with random pixels from a fixed seed."""
    side = -(-int(settings(name, arguments)["min_size"]) // PADDED_TO) * PADDED_TO
    pixels = torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * samples)}


def detect(module: nn.Module, batch: Batch, originals: Sequence[Size]) -> list[Detections]:
    """The detections of the whole detector on a prepared batch.

    The same steps as in torchvision's ``forward``, but with boxes and scores in float32 whatever the dtype of the
    model: bfloat16 cannot represent the coordinates of a box of 1000 pixels, and non-maximum suppression does not
    support it.

    Args:
        module: a torchvision Mask R-CNN.
        batch: resized and padded images, from ``Detector.prepare``.
        originals: height and width of each original image, to which the results are scaled.
    """
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.roi_heads import maskrcnn_inference
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    model: Any = module
    sizes = _sizes(batch)
    features = model.backbone(batch["pixel_values"])
    maps = list(features.values())
    objectness, deltas = model.rpn.head(maps)
    anchors = model.rpn.anchor_generator(ImageList(batch["pixel_values"], sizes), maps)
    counts = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = model.rpn.box_coder.decode(deltas.float(), anchors).reshape(len(sizes), -1, 4)
    boxes, _ = model.rpn.filter_proposals(proposals, objectness.float(), sizes, counts)
    heads = model.roi_heads
    logits, shifts = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
    boxes, scores, labels = heads.postprocess_detections(logits.float(), shifts.float(), boxes, sizes)
    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, sizes)))
    named = zip(boxes, scores, labels, maskrcnn_inference(masks.float(), labels), strict=True)
    found = [dict(zip(("boxes", "scores", "labels", "masks"), row, strict=True)) for row in named]
    return [
        Detections(row["boxes"], row["scores"], row["labels"], row["masks"][:, 0] > MASK_THRESHOLD)
        for row in model.transform.postprocess(found, sizes, list(originals))
    ]


def _sizes(batch: Batch) -> list[Size]:
    return [(height, width) for height, width in batch["image_sizes"].tolist()]


def _cells(sizes: Sequence[Size], pixels: Tensor, map_: Tensor) -> list[Size]:
    """Height and width in cells of the unpadded part of a map, for each image; rounded up."""
    return [
        (-(-height * map_.shape[-2] // pixels.shape[-2]), -(-width * map_.shape[-1] // pixels.shape[-1]))
        for height, width in sizes
    ]


def _transform(values: Mapping[str, Any]) -> Any:
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    return GeneralizedRCNNTransform(values["min_size"], values["max_size"], MEAN, STD, PADDED_TO).eval()


def _build(values: Mapping[str, Any]) -> nn.Module:
    import timm
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead

    from mlorq.models.detection_parts import (
        ANCHOR_RATIOS,
        AlignedRegions,
        ExactAnchors,
        SwinPyramid,
        pad_before_shifting,
    )

    levels = len(values["depths"])
    with contextlib.redirect_stdout(sys.stderr):
        body = timm.create_model(
            TIMM_NAME,
            pretrained=False,
            features_only=True,
            out_indices=tuple(range(levels)),
            embed_dim=values["embed_dim"],
            depths=tuple(values["depths"]),
            num_heads=tuple(values["num_heads"]),
            window_size=values["window_size"],
            # Any image size, and windows that never shrink to a small map.
            strict_img_size=False,
            always_partition=True,
            drop_path_rate=0.0,
        )
    pad_before_shifting(body)
    width = values["fpn_channels"]
    backbone = SwinPyramid(body, [values["embed_dim"] * 2**level for level in range(levels)], width)
    strides = [4 * 2**level for level in range(levels + 1)]
    names = [str(level) for level in range(levels)]
    module = MaskRCNN(
        backbone,
        min_size=values["min_size"],
        max_size=values["max_size"],
        image_mean=MEAN,
        image_std=STD,
        size_divisible=PADDED_TO,
        rpn_anchor_generator=ExactAnchors(strides),
        rpn_head=RPNHead(width, len(ANCHOR_RATIOS)),
        rpn_pre_nms_top_n_test=values["proposals"],
        rpn_post_nms_top_n_test=values["proposals"],
        box_roi_pool=AlignedRegions(names, strides[:-1], 7),
        box_head=TwoMLPHead(width * 7**2, values["box_channels"]),
        box_predictor=FastRCNNPredictor(values["box_channels"], values["num_classes"]),
        box_score_thresh=values["score_threshold"],
        box_detections_per_img=values["detections"],
        mask_roi_pool=AlignedRegions(names, strides[:-1], 14),
        mask_head=MaskRCNNHeads(width, [values["mask_channels"]] * 4, 1),
        mask_predictor=MaskRCNNPredictor(values["mask_channels"], values["mask_channels"], values["num_classes"]),
    )
    assert isinstance(module, nn.Module)
    return module.eval()
