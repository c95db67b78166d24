"""The parts of Mask R-CNN in which timm's Swin and torchvision differ from what published checkpoints were trained in.

- Windows: padded first, then shifted. timm shifts first: pixels then meet others in the windows at the border, and the
  features differ by several per cent unless both sides are multiples of all windows.
- Regions: pooled with half a pixel's shift (``aligned``) and as many sampling points as a cell has pixels.
- Anchors: not rounded, at multiples of the true strides; torchvision divides the image's size by the map's, which is
  another number where a map was rounded up.
- Features: each stage's output has a norm of its own before the pyramid.
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

ANCHOR_SCALE = 8  # an anchor's side in strides
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height to width
FINEST_REGION = 56  # regions with sides up to twice this are pooled from the finest map


class PadFirstBlock(SwinTransformerBlock):
    """A Swin block that pads its input to whole windows and then shifts it, under the mask of the padded size."""

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
    """Let all Swin blocks of a timm model pad first; timm's constructor has no place for a block of another class."""
    for block in body.modules():
        if type(block) is SwinTransformerBlock:
            block.__class__ = PadFirstBlock


class SwinPyramid(nn.Module):
    """A Swin backbone, a norm for each stage's output, and a feature pyramid with one more level by subsampling.

    Args:
        body: timm's Swin with ``features_only``: one map a stage, ``(samples, height, width, channels)``.
        channels: of the stages.
        out_channels: of the pyramid.
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
    """Pools regions from the level that fits their size, aligned to pixel centres.

    Args:
        names: of the maps, finest first.
        strides: of the maps, in pixels.
        output_size: cells of a pooled region, a side.
    """

    def __init__(self, names: Sequence[str], strides: Sequence[int], output_size: int) -> None:
        super().__init__(list(names), output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any = None) -> Tensor:
        """``(regions, channels, size, size)``; the regions of the first sample come first, then the second's.

        Args:
            x: maps by name.
            boxes: ``(regions, 4)`` in pixels, one tensor a sample.
            image_shapes: not looked at, for the strides are known.
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
            # Sampling positions need float32, whatever the model runs in.
            pooled.append(roi_align(x[name].float(), rows[chosen], self.output_size, 1 / stride, 0, aligned=True))
        order = torch.cat(places).argsort()
        return torch.cat(pooled)[order].to(x[self.featmap_names[0]].dtype)


class ExactAnchors(AnchorGenerator):
    """Anchors of 8 strides and three shapes, at multiples of the strides, nothing rounded.

    Args:
        strides: of the pyramid's levels, in pixels.
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
        """Anchors about the origin, ``(ratios · scales, 4)``."""
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        side = torch.tensor(scales, dtype=dtype, device=device)
        width, height = (side / root[:, None]).flatten(), (side * root[:, None]).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """``(anchors of all levels, 4)`` for each image: rows, then columns, then shapes."""
        levels = []
        for map_, stride, cell in zip(feature_maps, self.strides, self.cell_anchors, strict=True):
            down, across = (torch.arange(size, device=map_.device) * stride for size in map_.shape[-2:])
            top, left = torch.meshgrid(down, across, indexing="ij")
            origin = torch.stack([left, top, left, top], dim=-1).reshape(-1, 1, 4)
            levels.append((origin + cell.to(map_.device)).reshape(-1, 4))
        return [torch.cat(levels)] * len(image_list.image_sizes)
