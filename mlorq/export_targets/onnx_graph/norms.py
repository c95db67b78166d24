"""Batch normalisation as a product and a sum, for exporters.

Exporters merge a batch normalisation with the layer before it, which changes the layer's weight: the codes of a
compressed layer would have no place in the graph. A product and a sum per channel are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlorq.forms.modules import swap_module

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ChannelAffine(nn.Module):
    """``scale · x + shift`` per channel, the second axis.

    Args:
        norm: a batch normalisation with running statistics, in eval mode.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        mean, variance, eps = norm.running_mean, norm.running_var, norm.eps
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        assert isinstance(eps, float)
        scale = torch.rsqrt(variance.double() + eps)
        if isinstance(norm.weight, Tensor):
            scale = scale * norm.weight.double()
        shift = -mean.double() * scale
        if isinstance(norm.bias, Tensor):
            shift = shift + norm.bias.double()
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", shift.float())

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


def split_batch_norms(module: nn.Module) -> None:
    """Replace the batch normalisations of a model, in place; classes with code of their own stay."""
    for path, child in list(module.named_modules()):
        if type(child) in KINDS and child.running_mean is not None:
            split = ChannelAffine(child)
            for name in [name for name, one in module.named_modules(remove_duplicate=False) if one is child]:
                swap_module(module, name, child, split)
            assert module.get_submodule(path) is split
