"""Training of the ranges of activation quantizers with the layers around them (LSQ, arXiv 1902.08153; METHOD 8)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mlorq.activations.quantizers import ActivationQuantizer


class TrainableRange:
    """One tensor of a quantizer, such as its scale, which training multiplies by ``exp(growth)``.

    Args:
        name: of the tensor in the model.
        quantizer: the quantizer, which uses the trained value while ``attached``.
        key: name of the tensor in the quantizer, one of ``quantizer.learned``.
    """

    def __init__(self, name: str, quantizer: ActivationQuantizer, key: str) -> None:
        self.name, self.quantizer, self.key = name, quantizer, key
        given = quantizer._buffers[key]
        assert given is not None
        self.given = given.detach().clone()
        self.growth = nn.Parameter(torch.zeros_like(self.given))

    def value(self) -> Tensor:
        """The current value, differentiable."""
        return self.given * self.growth.exp()

    def refresh(self) -> None:
        """Set the current value in the quantizer."""
        self.quantizer._buffers[self.key] = self.value()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the quantizer learn, and restore its tensor at the end, for which ``refresh`` sets another."""
        kept, self.quantizer.learning = self.quantizer._buffers[self.key], True
        try:
            yield
        finally:
            self.quantizer._buffers[self.key], self.quantizer.learning = kept, False

    def result(self) -> Tensor:
        """The current value, on the CPU."""
        return self.value().detach().cpu()


def trainable_ranges(root: nn.Module, within: str = "") -> list[TrainableRange]:
    """The tensors that training may scale, of all quantizers of a model or of one of its submodules, each once.

    Args:
        root: the model.
        within: name of the submodule; default: the whole model.
    """
    found = []
    for name, child in root.get_submodule(within).named_modules(prefix=within):
        if isinstance(child, ActivationQuantizer):
            found += [TrainableRange(f"{name}.{key}", child, key) for key in child.learned]
    return found
