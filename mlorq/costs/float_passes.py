"""What measurements of many layers share: the float model's outputs on the same samples, and its blocks' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mlorq.models.base import FloatModel
from mlorq.models.batches import move_batch
from mlorq.models.partial_forward import Segments, enters_cleanly


class FloatPasses:
    """Forward passes of the float model on fixed samples, each made once for all layers that are measured on them.

    Layers are best taken in execution order: the outputs of one block are kept, from which those of later blocks
    follow.

    Args:
        model: the float model, on ``device``, with its own weights whenever a method is called.
        blocks: names of the model's blocks.
        batches: the samples.
        device: device of the model.

    Attributes:
        segments: partial passes of the model.
        batches: the samples, on the device.
    """

    def __init__(
        self, model: FloatModel, blocks: Sequence[str], batches: Sequence[Any], device: torch.device | str = "cpu"
    ) -> None:
        self.segments = Segments(model, model.module, blocks)
        self.batches = [move_batch(batch, device, model.dtype) for batch in batches]
        self._at = 0
        self._carries: list[Any] = [None] * len(self.batches)
        self._enters: dict[int, bool] = {0: True}

    @cached_property
    def outputs(self) -> list[Tensor]:
        """f(x), ``(samples, outputs)`` per batch."""
        return [self.segments.outputs(batch) for batch in self.batches]

    def entry(self, block: int) -> tuple[int, list[Any]]:
        """Where passes for a change in a block are entered: at the block, or at 0 if that is not possible.

        Returns:
            The index of a block, and the output of the block before it for each batch.
        """
        if not self._enters.get(block, True):
            return 0, [None] * len(self.batches)
        start, carries = (self._at, self._carries) if self._at <= block else (0, [None] * len(self.batches))
        pairs = zip(self.batches, carries, strict=True)
        carries = [self.segments.advance(batch, start, carry, block) for batch, carry in pairs]
        if block not in self._enters:
            self._enters[block] = enters_cleanly(self.segments, self.batches[0], block, carries[0], self.outputs[0])
            if not self._enters[block]:
                return self.entry(block)
        self._at, self._carries = block, carries
        return block, carries
