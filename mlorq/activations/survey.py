"""What the activations of a model look like: a bounded random sample of every tensor that will be quantized.

The tensors are the inputs of the compressible layers, one for all layers that read the same, and the operands of the
products of two activations, named after the module that multiplies and the number of the product in its call.

Tokens may be drawn with the chances that their importance gives them (``token_importance``): a mean over what was drawn
is then the mean that counts. A class token, one of 197 in a ViT and unlike the others, would hardly be seen otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.activations.products import ProductMode
from mlorq.calibration.collect import counting
from mlorq.calibration.token_importance import Importance
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel, batch_samples, move_batch
from mlorq.models.layers import Layer, input_tokens

KEPT = 1 << 20  # numbers kept of a tensor, all batches together
GELU_LEAST = -0.17  # min over x of x Φ(x) is -0.16997


@dataclass
class Observed:
    """What was seen of one tensor.

    Attributes:
        name: the layer, the first of those that read the tensor, or ``module#number_left`` of a product's operand.
        layers: that read it; empty for operands.
        size: entries per sample.
        macs: of a product's left operand: multiply-accumulates of the product per sample; 0 of others.
        values: ``(tokens, channels)`` of a linear layer's input, ``(numbers,)`` of others; random ones, float32.
        low, high: least and largest of all that was seen.
        sums_to_one: whether every last axis was non-negative with sum 1: probabilities.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    parts: list[Tensor] = field(default_factory=list)
    low: float = float("inf")
    high: float = -float("inf")
    sums_to_one: bool = False
    macs: int = 0

    @property
    def values(self) -> Tensor:
        return torch.cat(self.parts)

    @property
    def is_gelu_output(self) -> bool:
        """Whether the values lie where those of GELU do: down to its least value, and no further."""
        return GELU_LEAST <= self.low <= 0.9 * GELU_LEAST and self.high > -self.low

    def add(self, values: Tensor, share: int, generator: torch.Generator, weights: Tensor | None = None) -> None:
        """Keep ``share`` numbers of ``(tokens, channels)`` or ``(numbers,)``, whole tokens, drawn by their weights."""
        low, high = values.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        wanted = max(1, share // (values.shape[1] if values.dim() == 2 else 1))
        if weights is not None:
            chosen = torch.multinomial(weights, min(wanted, len(values)), replacement=True, generator=generator)
            values = values[chosen.to(values.device)]
        elif len(values) > wanted:
            values = values[torch.randint(len(values), (wanted,), generator=generator).to(values.device)]
        self.parts.append(values.float())


def survey(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    *,
    products: bool = True,
    importance: Sequence[Importance] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Observed]:
    """Run a model over some samples and look at its activations. Padding tokens are left out where a mask tells them.

    Args:
        model: the float model, on ``device``.
        layers: the compressible layers.
        batches: samples.
        products: look at products of activations too.
        importance: weights of the tokens that linear layers read, one mapping per batch; None: all weigh the same.
        seed: of the choice of what is kept.
        device: where the batches are moved to.
        progress: called with (batches done, batches).

    Raises:
        ModelError: an activation is not finite; the layer or module is named.
    """
    generator = torch.Generator().manual_seed(seed)
    leaders: dict[int, Layer] = {}
    for layer in layers:
        leaders.setdefault(layer.input_group, layer)
    kinds = {leader.name: leader.kind for leader in leaders.values()}
    found: dict[str, Observed] = {}
    for group, leader in leaders.items():
        names = tuple(layer.name for layer in layers if layer.input_group == group)
        found[leader.name] = Observed(leader.name, names, 0)
    owners = _owners(model, move_batch(batches[0], device, model.dtype)) if products else set()
    share = max(1, KEPT // len(batches))
    for index, batch in enumerate(batches):
        moved = move_batch(batch, device, model.dtype)
        count, mask = batch_samples(batch), model.token_mask(moved)
        weighed: Importance = {} if importance is None else importance[index]

        def look(
            name: str,
            values: Tensor,
            count: int = count,
            mask: Tensor | None = mask,
            weighed: Importance = weighed,
        ) -> None:
            if not torch.isfinite(values).all():
                raise ModelError(f"activations at {name!r} are not finite")
            observed = found[name]
            observed.size = max(observed.size, values.numel() // count)
            kind = kinds.get(name)
            weights = weighed.get(name) if kind == "linear" else None
            tokens = values if weights is None else input_tokens(model.module.get_submodule(name), values, count)
            # Weights are of a layer's first call; a later one may see other tokens.
            if weights is not None and weights.shape == tokens.shape[:2]:
                counted = counting(mask, tokens)
                chosen = torch.ones_like(weights, dtype=torch.bool) if counted is None else counted.to(weights.device)
                observed.add(tokens[chosen.to(tokens.device)], share, generator, weights[chosen])
            else:
                observed.add(_counted(values, mask, kind), share, generator)

        def on_product(
            name: str, left: Tensor, right: Tensor, look: Callable[..., None] = look, count: int = count
        ) -> None:
            for side, values in (("left", left), ("right", right)):
                key = f"{name}_{side}"
                if key not in found:
                    found[key] = Observed(key, (), 0, sums_to_one=side == "left" and _are_probabilities(values))
                look(key, values)
            one = found[f"{name}_left"]
            one.macs = max(one.macs, left.numel() // count * right.shape[-1])

        with (
            torch.no_grad(),
            _layers_seen(model.module, list(leaders.values()), look),
            _products_seen(model.module, owners, on_product),
        ):
            model.outputs(model.module, moved)
        if progress is not None:
            progress(index + 1, len(batches))
    return list(found.values())


def _counted(values: Tensor, mask: Tensor | None, kind: str | None) -> Tensor:
    """What counts of a tensor: a linear layer's tokens, ``(tokens, channels)``; numbers of all else.

    Args:
        values: as the layer or product sees it.
        mask: of the batch's tokens.
        kind: of the layer; None for an operand of a product.
    """
    if kind == "linear":
        chosen = counting(mask, values) if values.dim() == 3 else None
        return values.reshape(-1, values.shape[-1]) if chosen is None else values[chosen]
    if mask is not None and kind is None and values.dim() == 4:
        # (samples, heads, tokens, ·), or with the tokens last where keys are transposed already.
        for axis in (-2, -1):
            if (values.shape[0], values.shape[axis]) == tuple(mask.shape):
                return values.movedim(axis, 1)[mask].reshape(-1)
    return values.reshape(-1)


def _are_probabilities(values: Tensor) -> bool:
    sums = values.float().sum(-1)
    return bool(values.min() >= 0) and bool(((sums - 1).abs() < 1e-3).all())


@contextmanager
def _layers_seen(module: nn.Module, layers: Sequence[Layer], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: look(name, args[0])

    handles = [module.get_submodule(layer.name).register_forward_pre_hook(hook(layer.name)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _products_seen(module: nn.Module, owners: set[str], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls ``seen("owner#number", left, right)`` for products in calls of the owners."""
    if not owners:
        yield
        return
    running: list[tuple[str, int]] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append((name, 0))

    def operands(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if running:
            name, count = running[-1]
            running[-1] = (name, count + 1)
            seen(f"{name}#{count}", left, right)
        return left, right

    handles = []
    for name in sorted(owners):
        child = module.get_submodule(name)
        handles += [
            child.register_forward_pre_hook(enter(name)),
            child.register_forward_hook(lambda *_: running.pop() and None),
        ]
    try:
        with ProductMode(operands):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(model: FloatModel, batch: Any) -> set[str]:
    """Names of the modules whose own code multiplies activations; one inside another such module is part of that."""
    found: set[str] = set()
    names = {name for name, _ in model.module.named_modules()}

    def seen(name: str, _: Tensor, __: Tensor) -> None:
        found.add(name.rpartition("#")[0])

    with torch.no_grad(), _products_seen(model.module, names - {""}, seen):
        model.outputs(model.module, batch)
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}
