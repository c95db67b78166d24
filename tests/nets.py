"""Small networks with known structure for tests of the numerics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel, call_module


class Block(nn.Module):
    """Residual block with two linear layers on tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class TokenNet(nn.Module):
    """A patch convolution, a chain of blocks, mean pooling and a head; in-place activation after the convolution."""

    def __init__(self, width: int = 8, blocks: int = 3, outputs: int = 4, channels: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 2, stride=2)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, outputs)
        self.unused = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.patch(images)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class SkipNet(TokenNet):
    """Like TokenNet, but the head also reads the first block's output: its blocks are no chain."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.patch(images)).flatten(2).transpose(1, 2)
        first = None
        for block in self.blocks:
            x = block(x)
            first = x if first is None else first
        return self.head((x + 2 * first).mean(1))


class SharedNet(nn.Module):
    """One weight used by two modules, and one module called twice."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.twice(torch.tanh(self.twice(x))).mean(1)


def images(samples: int, seed: int, channels: int = 2, size: int = 6) -> Tensor:
    return torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(seed))


def float_model(module: nn.Module, blocks: tuple[str, ...] = ()) -> FloatModel:
    return FloatModel(module, "custom", {"family": "custom"}, call_module, blocks=list(blocks))


def token_net(seed: int, kind: type[TokenNet] = TokenNet) -> FloatModel:
    torch.manual_seed(seed)
    module = kind()
    return float_model(module, tuple(f"blocks.{index}" for index in range(len(module.blocks))))
