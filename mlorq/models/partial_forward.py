"""Running a model from the middle: everything before the first changed block is computed once.

A model whose blocks run one after another, each on the output of the one before, can be entered at any block:
the blocks before it hand on a kept output instead of computing theirs, and the code around the blocks (embeddings,
masks, pooling, head) runs as it always does. It can be left early at any block or layer. Works on any module whose
blocks are a chain; ``enters_cleanly`` checks that a model's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel


class _Reached(Exception):
    """Ends a forward pass early, carrying what was waited for."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Segments:
    """Partial forwards of one module (the float model or a compressed copy of it)."""

    def __init__(self, model: FloatModel, module: nn.Module, blocks: Sequence[str]) -> None:
        self.model = model
        self.module = module
        self.blocks = [module.get_submodule(name) for name in blocks]

    @torch.no_grad()
    def outputs(self, batch: Any, start: int = 0, carry: Any = None) -> Tensor:
        """f(x), ``(samples, outputs)``, entered at block ``start`` with the output of the block before it."""
        return self.differentiable_outputs(batch, start, carry)

    def differentiable_outputs(self, batch: Any, start: int = 0, carry: Any = None) -> Tensor:
        """``outputs``, through which gradients reach ``carry``."""
        with self._entered_at(start, carry):
            return self.model.outputs(self.module, batch)

    @torch.no_grad()
    def block_arguments(self, batch: Any, start: int, carry: Any, block: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a block is called with, entered at block ``start``."""

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached((args, kwargs))

        handle = self.blocks[block].register_forward_pre_hook(leave, with_kwargs=True)
        result: tuple[tuple[Any, ...], dict[str, Any]] = self._until(batch, start, carry, handle)
        return result

    @torch.no_grad()
    def advance(self, batch: Any, start: int, carry: Any, stop: int) -> Any:
        """Output of block ``stop - 1``, entered at block ``start``; ``carry`` itself where ``stop == start``."""
        if stop == start:
            return carry

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output)

        return self._until(batch, start, carry, self.blocks[stop - 1].register_forward_hook(leave))

    @torch.no_grad()
    def layer_inputs(self, batch: Any, start: int, carry: Any, layer: str) -> Tensor:
        """The input of a layer's first call, entered at block ``start``, left there."""

        def leave(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self.module.get_submodule(layer).register_forward_pre_hook(leave)
        result: Tensor = self._until(batch, start, carry, handle)
        return result

    def _until(self, batch: Any, start: int, carry: Any, handle: Any) -> Any:
        try:
            with self._entered_at(start, carry):
                self.model.outputs(self.module, batch)
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise RuntimeError("the forward pass ended before the block or layer that was waited for")

    @contextmanager
    def _entered_at(self, start: int, carry: Any) -> Iterator[None]:
        skipped = self.blocks[:start]
        try:
            for block in skipped:
                # An instance attribute hides the class's method until it is deleted again.
                block.forward = lambda *_, **__: carry
            yield
        finally:
            for block in skipped:
                block.__dict__.pop("forward", None)


def enters_cleanly(segments: Segments, batch: Any, start: int, carry: Any, expected: Tensor) -> bool:
    """Whether a run entered at ``start`` gives the full forward's outputs, up to rounding.

    False for models whose later parts read earlier blocks again (feature pyramids): run those in full.
    """
    if start == 0:
        return True
    try:
        found = segments.outputs(batch, start, carry)
        return bool((found - expected).norm() <= 1e-5 * expected.norm())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # who reads an earlier block again was given a tensor of another shape
        return False
