"""Quantized layers whose codes, scales, factors and biases are trained (METHOD 7).

Codes become latent numbers in code units, rounded in every forward pass and trained as if they were not (straight
through); scales are trained as logarithms of their growth. What is computed from both stands in the module in the place
of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.forms import CompressedLayer, combine
from mlorq.layers import Layer
from mlorq.quantizers import SMALLEST_SCALE, QuantizedMatrix


class _Matrix:
    """One stored matrix with trainable codes and scales."""

    def __init__(self, matrix: QuantizedMatrix, device: torch.device) -> None:
        self.stored = matrix
        self.zero = matrix.zero_point.float().to(device).unsqueeze(1)
        self.base = matrix.scale.float().to(device).unsqueeze(1)
        self.top = 2**matrix.bits - 1
        self.latent = nn.Parameter(matrix.codes.float().to(device))
        self.growth = nn.Parameter(torch.zeros_like(self.base))  # of the scale, as a logarithm

    def scale(self) -> Tensor:
        return self.base * self.growth.exp()

    def values(self) -> Tensor:
        """Dequantized; gradients pass the rounding, and stop where a code is clamped."""
        inside = self.latent.clamp(0, self.top)
        codes = inside + (inside.round() - inside).detach()
        scale = self.scale()
        stored = scale.detach().to(torch.float16).float().clamp(min=SMALLEST_SCALE)
        return (codes - self.zero) * (scale + (stored - scale).detach())

    def result(self) -> QuantizedMatrix:
        codes = self.latent.detach().clamp(0, self.top).round().to(torch.uint8).cpu()
        scale = self.scale().detach().squeeze(1).to(torch.float16).clamp(min=SMALLEST_SCALE).cpu()
        return replace(self.stored, codes=codes, scale=scale)


class TrainableLayer:
    """A layer whose weight and bias are computed from what is trained, while ``attached``.

    Args:
        root: the model that holds it.
        layer: where it is. Modules that share its weight compute with what is trained too; their biases stay.
        compressed: what training starts from.
    """

    def __init__(self, root: nn.Module, layer: Layer, compressed: CompressedLayer) -> None:
        self.module = root.get_submodule(layer.name)
        self.modules = [self.module, *(root.get_submodule(name) for name in layer.aliases)]
        self.layer = compressed
        weight = self.module._parameters["weight"]
        assert weight is not None
        self.shape, self.dtype = weight.shape, weight.dtype
        self.matrices = {name: _Matrix(matrix, weight.device) for name, matrix in compressed.matrices.items()}
        bias = self.module._parameters.get("bias")
        own = bias is not None and not layer.aliases
        self.bias = nn.Parameter(bias.detach().float().clone()) if own and bias is not None else None

    def refresh(self) -> None:
        """Compute the weight anew; the graph reaches back to what is trained."""
        dense = combine({name: matrix.values() for name, matrix in self.matrices.items()})
        weight = dense.reshape(self.shape).to(self.dtype)
        for module in self.modules:
            module.weight = weight
        if self.bias is not None:
            self.module.bias = self.bias.to(self.dtype)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Plain tensors in the place of the modules' parameters, which come back at the end."""
        names = [(module, "weight") for module in self.modules]
        names += [(self.module, "bias")] if self.bias is not None else []
        kept = [(module, name, module._parameters.pop(name)) for module, name in names]
        try:
            yield
        finally:
            for module, name, parameter in kept:
                module.__dict__.pop(name, None)
                module._parameters[name] = parameter

    def result(self) -> CompressedLayer:
        matrices = {name: matrix.result() for name, matrix in self.matrices.items()}
        bias = self.layer.bias if self.bias is None else self.bias.detach().float().cpu().clone()
        return replace(self.layer, matrices=matrices, bias=bias)


def refresh_all(layers: Sequence[TrainableLayer]) -> None:
    """Compute all weights anew, with gradients whatever the caller does."""
    with torch.enable_grad():
        for layer in layers:
            layer.refresh()


@contextmanager
def all_attached(layers: Sequence[TrainableLayer]) -> Iterator[None]:
    """What is trained in the place of the modules' parameters, which come back at the end."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.attached())
        yield


def parameter_groups(
    layers: Sequence[TrainableLayer], code_rate: float, scale_rate: float, bias_rate: float
) -> list[dict[str, Any]]:
    """What an optimiser trains, each kind at its own rate: codes in codes, scales relative to them, biases."""
    matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
    groups: list[dict[str, Any]] = [
        {"params": [matrix.latent for matrix in matrices], "lr": code_rate},
        {"params": [matrix.growth for matrix in matrices], "lr": scale_rate},
    ]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return groups + ([{"params": biases, "lr": bias_rate}] if biases else [])


def batch_order(count: int, steps: int, seed: int) -> list[int]:
    """Which batch each step sees: every one once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]
