"""Parts of Mask R-CNN as published checkpoints were trained, where timm's Swin and torchvision differ from that.

- Windows: padded first, then shifted. timm shifts first, which changes the windows at the border; the features then
  differ by several per cent unless both sides are multiples of all windows.
- Regions: pooled with a shift of half a pixel (``aligned``) and as many sampling points as a cell has pixels.
- Anchors: not rounded, at multiples of the true strides. torchvision divides the size of the image by that of the map,
  which differs from the stride if the size of the map was rounded up.
- Features: each stage's output has its own norm before the pyramid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

ANCHOR_SCALE = 8  # side of an anchor, in strides
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
FINEST_REGION = 56  # pixels; regions with sides below twice this are pooled from the finest map


class PadFirstBlock(SwinTransformerBlock):
    """A Swin block that pads its input to whole windows before the shift; the attention mask has the padded size."""

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        (down, across), (shift_down, shift_across) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % across, 0, -height % down))
        padded_height, padded_width = x.shape[1:3]
        shifted = bool(shift_down or shift_across)
        if shifted:
            x = torch.roll(x, shifts=(-shift_down, -shift_across), dims=(1, 2))
        windows = window_partition(x, self.window_size).reshape(-1, down * across, channels)
        windows = self.attn(windows, mask=self.get_attn_mask(x))
        x = window_reverse(windows.reshape(-1, down, across, channels), self.window_size, padded_height, padded_width)
        if shifted:
            x = torch.roll(x, shifts=(shift_down, shift_across), dims=(1, 2))
        return x[:, :height, :width].contiguous()


def pad_before_shifting(body: nn.Module) -> None:
    """Change all Swin blocks of a timm model to ``PadFirstBlock``; timm's constructor does not accept a block class."""
    for block in body.modules():
        if type(block) is SwinTransformerBlock:
            block.__class__ = PadFirstBlock


class SwinPyramid(nn.Module):
    """A Swin backbone, a norm per stage, and a feature pyramid with an additional level by subsampling.

    Args:
        body: timm's Swin with ``features_only``: one map per stage, ``(samples, height, width, channels)``.
        channels: number of channels per stage.
        out_channels: number of channels of the pyramid.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels)
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps by level: ``0`` (finest) … and ``pool``, each ``(samples, out_channels, height, width)``."""
        found = zip(self.norms, self.body(x), strict=True)
        maps = OrderedDict((str(level), norm(map_).permute(0, 3, 1, 2)) for level, (norm, map_) in enumerate(found))
        result: OrderedDict[str, Tensor] = self.fpn(maps)
        return result


class AlignedRegions(MultiScaleRoIAlign):
    """Pooling of regions from the level that suits their size, aligned to pixel centres.

    Args:
        names: names of the maps, finest first.
        strides: strides of the maps, in pixels.
        output_size: number of cells of a pooled region, per side.
    """

    def __init__(self, names: Sequence[str], strides: Sequence[int], output_size: int) -> None:
        super().__init__(list(names), output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any = None) -> Tensor:
        """Pooled regions, ``(regions, channels, size, size)``, ordered by sample.

        Args:
            x: maps by name.
            boxes: ``(regions, 4)`` in pixels, one tensor per sample.
            image_shapes: ignored, because the strides are known.
        """
        regions = torch.cat(boxes).float()
        sample = torch.cat([torch.full_like(part[:, :1], index) for index, part in enumerate(boxes)]).float()
        rows = torch.cat([sample, regions], dim=1)
        side = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).clamp(min=0).sqrt()
        level = (side / FINEST_REGION + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        places, pooled = [], []
        for index, (name, stride) in enumerate(zip(self.featmap_names, self.strides, strict=True)):
            chosen = (level == index).nonzero().flatten()
            places.append(chosen)
            # Sampling positions need float32, whatever the dtype of the model.
            pooled.append(roi_align(x[name].float(), rows[chosen], self.output_size, 1 / stride, 0, aligned=True))
        order = torch.cat(places).argsort()
        return torch.cat(pooled)[order].to(x[self.featmap_names[0]].dtype)


class ExactAnchors(AnchorGenerator):
    """Anchors with sides of 8 strides and three shapes, at multiples of the strides, without rounding.

    Args:
        strides: strides of the pyramid's levels, in pixels.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        self.strides = tuple(strides)
        super().__init__(tuple((ANCHOR_SCALE * stride,) for stride in strides), (ANCHOR_RATIOS,) * len(strides))

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors centred at the origin, ``(ratios · scales, 4)``."""
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        side = torch.tensor(scales, dtype=dtype, device=device)
        width, height = (side / root[:, None]).flatten(), (side * root[:, None]).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of all levels, ``(anchors, 4)`` per image, ordered by level, row, column and shape."""
        levels = []
        for map_, stride, cell in zip(feature_maps, self.strides, self.cell_anchors, strict=True):
            down, across = (torch.arange(size, device=map_.device) * stride for size in map_.shape[-2:])
            top, left = torch.meshgrid(down, across, indexing="ij")
            origin = torch.stack([left, top, left, top], dim=-1).reshape(-1, 1, 4)
            levels.append((origin + cell.to(map_.device)).reshape(-1, 4))
        return [torch.cat(levels)] * len(image_list.image_sizes)
