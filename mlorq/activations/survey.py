"""Survey of a model's activations: a bounded random sample of every tensor to be quantized (METHOD 8).

The tensors are the inputs of the compressible layers, one for all layers that read the same tensor, and the operands of
the products of two activations, named after the module that multiplies and the number of the product in its call.

Tokens may be drawn in proportion to their importance (``token_importance``): a mean over the sample then estimates the
weighted mean. A ViT's class token, one of 197 and unlike the others, would otherwise hardly be sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.activations.products import ProductMode
from mlorq.calibration.token_importance import Importance
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel
from mlorq.models.batches import batch_samples, move_batch
from mlorq.models.direct import weight_of
from mlorq.models.layer_list import LINEAR, Layer
from mlorq.models.observe import first_argument
from mlorq.models.token_masks import TokenMask, counting
from mlorq.models.unfolding import input_tokens

KEPT = 1 << 20  # numbers kept per tensor, over all batches
GELU_LEAST = -0.17  # min over x of x Φ(x) is -0.16997


@dataclass
class Observed:
    """Observations of one tensor.

    Attributes:
        name: the first layer that reads the tensor, or ``module#number_left`` for a product's operand.
        layers: layers that read it; empty for operands.
        size: entries per sample.
        parts: the sample, one tensor per call.
        low, high: least and largest of all values.
        rows: a sample of an operand's vectors, ``(vectors, length)`` per call: along ``across``, or of all heads.
        across: of an operand, the axis that the product sums over, -1 or -2; None if it is not known, or if it is that
            of tokens (the values of attention), whose padding a range along it would include.
        heads: of the values of attention, ``(samples, heads, tokens, channels)``: ``(heads, channels)``; else None.
        sums_to_one: whether the values are probabilities: non-negative, with sum 1 along the last axis.
        macs: multiply-accumulates of the product per sample, for its left operand; 0 for other tensors.
        columns: ``(channels,)``, squared norms of the columns of all weights that read the input of linear layers.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    parts: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    across: int | None = None
    heads: tuple[int, int] | None = None
    low: float = float("inf")
    high: float = -float("inf")
    sums_to_one: bool = False
    macs: int = 0
    columns: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The sample, float32: ``(tokens, channels)`` of a linear layer's input, else ``(numbers,)``."""
        return torch.cat(self.parts)

    @property
    def vectors(self) -> Tensor:
        """``rows`` of all calls, ``(vectors, length)`` float32; shorter ones end in zeros."""
        length = max(rows.shape[1] for rows in self.rows)
        return torch.cat([nn.functional.pad(rows, (0, length - rows.shape[1])) for rows in self.rows])

    @property
    def is_gelu_output(self) -> bool:
        """Whether the range of the values is that of GELU: down to its least value, and no further."""
        return GELU_LEAST <= self.low <= 0.9 * GELU_LEAST and self.high > -self.low

    def add(self, values: Tensor, share: int, generator: torch.Generator, weights: Tensor | None = None) -> None:
        """Keep about ``share`` numbers of ``(tokens, channels)`` or ``(numbers,)``, as whole tokens, by ``weights``."""
        low, high = values.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        wanted = max(1, share // (values.shape[1] if values.dim() == 2 else 1))
        if weights is not None:
            chosen = torch.multinomial(weights, min(wanted, len(values)), replacement=True, generator=generator)
            values = values[chosen.to(values.device)]
        elif len(values) > wanted:
            values = values[torch.randint(len(values), (wanted,), generator=generator).to(values.device)]
        self.parts.append(values.float())

    def add_rows(self, values: Tensor, share: int, generator: torch.Generator) -> None:
        """Keep rows of ``(rows, length)`` with about ``share`` numbers."""
        wanted = max(1, share // max(1, values.shape[1]))
        if len(values) > wanted:
            values = values[torch.randint(len(values), (wanted,), generator=generator).to(values.device)]
        self.rows.append(values.float())


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
    """Observations of a model's activations on some samples, without padding tokens if the model has a token mask.

    Args:
        model: the float model, on ``device``.
        layers: the compressible layers.
        batches: samples.
        products: whether to observe products of activations as well.
        importance: weights of the tokens that linear layers read, one mapping per batch; None: equal weights.
        seed: seed of the sample.
        device: device of the model.
        progress: called with (batches done, batches).

    Raises:
        ModelError: an activation is not finite; the message names the layer or product.
    """
    generator, of_rows = (torch.Generator().manual_seed(seed) for _ in range(2))
    leaders: dict[int, Layer] = {}
    for layer in layers:
        leaders.setdefault(layer.input_group, layer)
    kinds = {leader.name: leader.kind for leader in leaders.values()}
    found: dict[str, Observed] = {}
    for group, leader in leaders.items():
        names = tuple(layer.name for layer in layers if layer.input_group == group)
        columns = _columns(model.module, names) if leader.kind == LINEAR else None
        found[leader.name] = Observed(leader.name, names, 0, columns=columns)
    owners = _owners(model, move_batch(batches[0], device, model.dtype)) if products else set()
    share = max(1, KEPT // len(batches))
    for index, batch in enumerate(batches):
        moved = move_batch(batch, device, model.dtype)
        count, mask = batch_samples(batch), model.token_mask(moved)
        weighted: Importance = {} if importance is None else importance[index]

        def observe(
            name: str,
            values: Tensor,
            count: int = count,
            mask: TokenMask = mask,
            weighted: Importance = weighted,
        ) -> None:
            if not values.numel():  # an expert without tokens
                return
            if not torch.isfinite(values).all():
                raise ModelError(
                    f"activations at {name!r} are not finite; check the model's weights and the calibration data"
                )
            observed = found[name]
            observed.size = max(observed.size, values.numel() // count)
            kind = kinds.get(name)
            weights = weighted.get(name) if kind == LINEAR else None
            tokens = values if weights is None else input_tokens(model.module.get_submodule(name), values, count)
            # Weights belong to a layer's first call; later calls may see other tokens.
            if weights is not None and weights.shape == tokens.shape[:2]:
                counted = counting(mask, tokens)
                chosen = torch.ones_like(weights, dtype=torch.bool) if counted is None else counted.to(weights.device)
                observed.add(tokens[chosen.to(tokens.device)], share, generator, weights[chosen])
            else:
                observed.add(_counted(values, mask, kind), share, generator)

        def on_product(
            name: str,
            left: Tensor,
            right: Tensor,
            equation: str | None,
            observe: Callable[..., None] = observe,
            count: int = count,
            mask: TokenMask = mask,
        ) -> None:
            if f"{name}_left" not in found:
                weights = _are_probabilities(left)
                known = equation is None
                across = -1 if known else None
                found[f"{name}_left"] = Observed(f"{name}_left", (), 0, sums_to_one=weights, across=across)
                across = -2 if known and not weights else None
                heads = (right.shape[1], right.shape[3]) if known and weights and right.dim() == 4 else None
                found[f"{name}_right"] = Observed(f"{name}_right", (), 0, across=across, heads=heads)
            for side, values in (("left", left), ("right", right)):
                key = f"{name}_{side}"
                observe(key, values)
                vectors = _vectors(found[key], values)
                if vectors is not None and values.numel():
                    found[key].add_rows(_counted(vectors, mask, None, rows=True), share, of_rows)
            one = found[f"{name}_left"]
            one.macs = max(one.macs, left.numel() // count * right.shape[-1])

        with (
            torch.no_grad(),
            _layers_seen(model.module, list(leaders.values()), observe),
            _products_seen(model.module, owners, on_product),
        ):
            model.outputs(model.module, moved)
        if progress is not None:
            progress(index + 1, len(batches))
    return list(found.values())


def _counted(values: Tensor, mask: TokenMask, kind: str | None, *, rows: bool = False) -> Tensor:
    """The unmasked part of a tensor: ``(tokens, channels)`` of a linear layer's input, else ``(numbers,)``.

    Args:
        values: the tensor that the layer or product reads.
        mask: masks of the batch's tokens.
        kind: kind of the layer; None for an operand of a product.
        rows: whether to keep the last axis of an operand: ``(rows, length)``.
    """
    if kind == LINEAR:
        chosen = counting(mask, values) if values.dim() == 3 else None
        return values.reshape(-1, values.shape[-1]) if chosen is None else values[chosen]
    flat = (-1, values.shape[-1]) if rows else (-1,)
    if kind is None and values.dim() == 4:
        # (samples, heads, tokens, ·), or with the tokens last if keys are already transposed.
        for axis in (-2,) if rows else (-2, -1):
            chosen = counting(mask, values, axis)
            if chosen is not None:
                return values.movedim(axis, 1)[chosen].reshape(flat)
    return values.reshape(flat)


def _columns(module: nn.Module, names: Sequence[str]) -> Tensor:
    """``Σ ‖W_i‖²`` over layers, ``(channels,)`` float32."""
    weights = [weight_of(module.get_submodule(name)).detach() for name in names]
    return sum((weight.float().square().sum(0) for weight in weights), start=weights[0].new_zeros(1).float())


def _vectors(observed: Observed, values: Tensor) -> Tensor | None:
    """An operand with its vectors, or those of all heads together, along the last axis of four."""
    if observed.across is not None:
        return values.movedim(observed.across, -1)
    if observed.heads is not None and (values.shape[1], values.shape[-1]) == observed.heads:
        return values.movedim(1, 2).flatten(2).unsqueeze(1)
    return None


def _are_probabilities(values: Tensor) -> bool:
    sums = values.float().sum(-1)
    return bool(values.min() >= 0) and bool(((sums - 1).abs() < 1e-3).all())


@contextmanager
def _layers_seen(module: nn.Module, layers: Sequence[Layer], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen(name, first_argument(args, kwargs))

    handles = [
        module.get_submodule(layer.name).register_forward_pre_hook(hook(layer.name), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _products_seen(module: nn.Module, owners: set[str], seen: Callable[..., None]) -> Iterator[None]:
    """Call ``seen("owner#number", left, right, equation)`` for every product in calls of the owners."""
    if not owners:
        yield
        return
    running: list[tuple[str, int]] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append((name, 0))

    def operands(left: Tensor, right: Tensor, equation: str | None) -> tuple[Tensor, Tensor]:
        if running:
            name, count = running[-1]
            running[-1] = (name, count + 1)
            seen(f"{name}#{count}", left, right, equation)
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
    """Names of the outermost modules whose own code multiplies activations."""
    found: set[str] = set()
    names = {name for name, _ in model.module.named_modules()}

    def seen(name: str, *_: Any) -> None:
        found.add(name.rpartition("#")[0])

    with torch.no_grad(), _products_seen(model.module, names - {""}, seen):
        model.outputs(model.module, batch)
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}
