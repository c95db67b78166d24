"""Partial forward passes: the part of a model before the first changed block is computed only once.

If the blocks of a model form a chain, each reading the output of the previous one, a forward pass can be entered at any
block: the blocks before it return a stored output, and the code around the blocks (embeddings, masks, pooling, head)
runs as usual. A pass can also be ended early at any block or layer. ``enters_cleanly`` checks whether the blocks of a
model form a chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel
from mlorq.models.batches import fresh
from mlorq.models.observe import first_argument

REPLACED = ("forward", "_forward_pre_hooks", "_forward_hooks")  # attributes of a block that is not run


class _Reached(Exception):
    """Raised to end a forward pass early; carries the requested value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class NotReached(RuntimeError):
    """A forward pass did not call the requested block or layer: an expert without tokens."""


class Segments:
    """Partial forward passes of one module.

    In all methods ``start`` is the index of the block at which the pass is entered, and ``carry`` the output of the
    block before it.

    Args:
        model: the float model.
        module: its module, or a compressed copy.
        blocks: names of the blocks in the chain.
    """

    def __init__(self, model: FloatModel, module: nn.Module, blocks: Sequence[str]) -> None:
        self.model = model
        self.module = module
        self.blocks = [module.get_submodule(name) for name in blocks]
        self._head: tuple[nn.Module | None] | None = None  # found when it is first asked for

    @torch.no_grad()
    def outputs(self, batch: Any, start: int = 0, carry: Any = None) -> Tensor:
        """f(x), ``(samples, outputs)``, entered at block ``start``."""
        return self.differentiable_outputs(batch, start, carry)

    def differentiable_outputs(self, batch: Any, start: int = 0, carry: Any = None) -> Tensor:
        """f(x), ``(samples, outputs)``, entered at block ``start``, with gradients down to ``carry``."""
        with self._entered_at(start, carry):
            return self.model.outputs(self.module, batch)

    def penultimate(self, batch: Any, start: int, carry: Any) -> Tensor:
        """The input of the model's head, ``(samples, …)`` float32, with gradients down to ``carry``.

        The head is the last linear layer, if it is called after all blocks; without one, f(x) takes the place of its
        input.
        """
        head = self._find_head(batch, start, carry)
        if head is None:
            return self.differentiable_outputs(batch, start, carry)

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(first_argument(args, kwargs).float())

        found: Tensor = self._until(batch, start, carry, head.register_forward_pre_hook(leave, with_kwargs=True))
        return found

    @torch.no_grad()
    def _find_head(self, batch: Any, start: int, carry: Any) -> nn.Module | None:
        if self._head is None:
            calls: list[nn.Module] = []
            watched = [child for child in self.module.modules() if isinstance(child, nn.Linear)] + self.blocks
            handles = [child.register_forward_hook(lambda child, *_: calls.append(child)) for child in watched]
            try:
                self.outputs(batch, start, carry)
            finally:
                for handle in handles:
                    handle.remove()
            last = calls[-1] if calls else None
            outside = isinstance(last, nn.Linear) and calls.count(last) == 1 and last not in self.blocks
            self._head = (last if outside else None,)
        return self._head[0]

    @torch.no_grad()
    def block_arguments(self, batch: Any, start: int, carry: Any, block: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of block ``block``, entered at block ``start``."""

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached((args, kwargs))

        handle = self.blocks[block].register_forward_pre_hook(leave, with_kwargs=True)
        result: tuple[tuple[Any, ...], dict[str, Any]] = self._until(batch, start, carry, handle)
        return result

    @torch.no_grad()
    def advance(self, batch: Any, start: int, carry: Any, stop: int) -> Any:
        """Output of block ``stop - 1``, entered at block ``start``; ``carry`` itself if ``stop == start``."""
        if stop == start:
            return carry

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output)

        return self._until(batch, start, carry, self.blocks[stop - 1].register_forward_hook(leave))

    @torch.no_grad()
    def layer_inputs(self, batch: Any, start: int, carry: Any, layer: str) -> Tensor:
        """Input of the first call of layer ``layer``, entered at block ``start``.

        Raises:
            NotReached: the pass does not call it.
        """

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(first_argument(args, kwargs))

        handle = self.module.get_submodule(layer).register_forward_pre_hook(leave, with_kwargs=True)
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
        raise NotReached("the forward pass did not reach the requested block or layer")

    @contextmanager
    def _entered_at(self, start: int, carry: Any) -> Iterator[None]:
        skipped = self.blocks[:start]
        before = [{name: vars(block)[name] for name in REPLACED if name in vars(block)} for block in skipped]
        try:
            for block in skipped:
                # An instance attribute overrides the method of the class until it is deleted. The hooks of the block
                # have run when the carry was made.
                block.forward = lambda *_, **__: carry
                block._forward_pre_hooks, block._forward_hooks = OrderedDict(), OrderedDict()
            if skipped:
                skipped[-1].forward = lambda *_, **__: fresh(carry)  # the next block may write into its input
            yield
        finally:
            for block, own in zip(skipped, before, strict=True):
                block.__dict__.pop("forward", None)
                block.__dict__.update(own)


def enters_cleanly(segments: Segments, batch: Any, start: int, carry: Any, expected: Tensor) -> bool:
    """Whether a pass entered at ``start`` gives the outputs of the full pass, up to a relative error of 1e-5.

    False for models whose later parts also read earlier blocks (feature pyramids): these need full passes.

    Args:
        segments: partial passes of the model.
        batch: one batch.
        start: index of a block.
        carry: output of the block before it.
        expected: outputs of the full pass, ``(samples, outputs)``.
    """
    if start == 0:
        return True
    try:
        found = segments.outputs(batch, start, carry)
        return bool((found - expected).norm() <= 1e-5 * expected.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a later part reads an earlier block and got a tensor of another shape, or none
        return False
