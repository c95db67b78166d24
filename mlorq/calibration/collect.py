"""One pass over the calibration data: reference outputs and a bounded random sample of every layer's inputs.

Later statistics of activations start from the sample; every compressed model is compared with the reference outputs
(METHOD 5). Non-finite values are refused here, before hours of search.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.calibration.covariance import OuterProducts, has_moments
from mlorq.calibration.token_importance import Importance, leaders
from mlorq.errors import ModelError
from mlorq.memory import block_width
from mlorq.models.base import FloatModel, join_outputs
from mlorq.models.batches import batch_samples
from mlorq.models.layer_list import Layer
from mlorq.models.observe import first_argument
from mlorq.models.prefetch import feed
from mlorq.models.token_masks import TokenMask, counting, mask_for
from mlorq.models.unfolding import input_tokens

FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class InputSample:
    """A random sample of a layer's inputs.

    Attributes:
        sample: ``(rows,)`` index of the calibration sample.
        token: ``(rows,)`` index of the token within that sample.
        x: ``(rows, groups · in_features)`` float16.
    """

    sample: Tensor
    token: Tensor
    x: Tensor


@dataclass(frozen=True)
class Captured:
    """The results of one pass over the calibration data.

    Attributes:
        reference: f(x), ``(samples, outputs)`` float32 on the CPU.
        samples: ``{layer: sample of its inputs}``.
        inputs: ``{layer: sums of outer products of its inputs}``, one object for all layers that read the same tensor;
            of those layers that ``moments`` asks for. Grouped convolutions are left out: their rows see different
            inputs.
    """

    reference: Tensor
    samples: dict[str, InputSample]
    inputs: dict[str, OuterProducts]


def capture(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    *,
    rows: int = 256,
    seed: int = 0,
    moments: bool | Collection[str] = False,
    importance: Sequence[Importance] | None = None,
    alone: Collection[str] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Captured:
    """Reference outputs, input samples and input moments of the float model on the calibration data.

    Args:
        model: the float model, on ``device``.
        layers: layers whose inputs are sampled.
        batches: calibration batches.
        rows: approximate number of input rows to keep per layer, spread evenly over the samples; tokens are drawn at
            random from the unmasked ones.
        seed: seed of the choice of tokens.
        moments: whether to sum the outer products of the inputs as well (METHOD 7), of all layers or of the named ones
            and those that read the same tensors.
        importance: weights of the tokens in these sums, one mapping per batch; None: equal weights.
        alone: names of layers whose inputs are some of a sample's tokens, or none of them (``LayerList.alone``).
        device: device of the model.
        progress: called with (batches done, batches).

    Raises:
        ModelError: a layer's input or the output is not finite; the message names the layer or the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(batch_samples(batch) for batch in batches)
    share = max(1, round(rows / total))
    kept: dict[str, list[InputSample]] = {layer.name: [] for layer in layers}
    references: list[Tensor] = []
    products = _products(layers, moments, device)
    leading = _leading(layers, products)
    first = 0

    for index, moved in enumerate(feed(batches, device, model.dtype)):
        count = batch_samples(moved)
        mask = model.token_mask(moved)
        seen: set[str] = set()
        weights = importance[index] if importance is not None else {}

        def hook(
            name: str, start: int, count: int, mask: TokenMask, seen: set[str], weights: Importance
        ) -> Callable[..., None]:
            def record(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
                inputs = first_argument(args, kwargs)
                if not torch.isfinite(inputs).all():
                    raise ModelError(
                        f"layer {name!r}: its inputs contain NaN or infinite values; "
                        "check the model's weights and the calibration data"
                    )
                if name in seen or not inputs.numel():
                    return
                seen.add(name)
                tokens = _tokens(name, child, inputs, count)
                own = mask_for(name, mask, alone)
                kept[name].append(_choose(tokens, own, share, start, generator))
                if name in leading:
                    products[name].add(tokens, start, counting(own, tokens), weights.get(leading[name]))

            return record

        handles = [
            model.module.get_submodule(layer.name).register_forward_hook(
                hook(layer.name, first, count, mask, seen, weights), with_kwargs=True
            )
            for layer in layers
        ]
        try:
            with torch.no_grad():
                outputs = model.outputs(model.module, moved).cpu()
        finally:
            for handle in handles:
                handle.remove()
        if not torch.isfinite(outputs).all():
            raise ModelError(
                f"the model's outputs contain NaN or infinite values (calibration batch {index}); "
                "check the model's weights and the calibration data"
            )
        references.append(outputs)
        first += count
        if progress is not None:
            progress(index + 1, len(batches))
    samples = {layer.name: _joined(layer, kept[layer.name]) for layer in layers}
    return Captured(join_outputs(references), samples, products)


class _AllSeen(Exception):
    """Raised to end a forward pass after the last layer whose inputs are wanted."""


def input_moments(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    moments: Collection[str],
    *,
    importance: Sequence[Importance] | None = None,
    alone: Collection[str] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, OuterProducts]:
    """``Captured.inputs`` alone, the same numbers, from passes that end after the last layer that is asked for.

    The arguments are those of ``capture``, which has checked that everything is finite.
    """
    products = _products(layers, moments, device)
    leading = _leading(layers, products)
    first = 0
    for index, moved in enumerate(feed(batches, device, model.dtype)):
        count = batch_samples(moved)
        mask = model.token_mask(moved)
        weights = importance[index] if importance is not None else {}
        left = set(leading)

        def hook(
            name: str, start: int, count: int, mask: TokenMask, left: set[str], weights: Importance
        ) -> Callable[..., None]:
            def add(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
                inputs = first_argument(args, kwargs)
                if name not in left or not inputs.numel():
                    return
                tokens = _tokens(name, child, inputs, count)
                own = counting(mask_for(name, mask, alone), tokens)
                products[name].add(tokens, start, own, weights.get(leading[name]))
                left.discard(name)
                if not left:
                    raise _AllSeen

            return add

        handles = [
            model.module.get_submodule(name).register_forward_hook(
                hook(name, first, count, mask, left, weights), with_kwargs=True
            )
            for name in leading
        ]
        try:
            with torch.no_grad(), contextlib.suppress(_AllSeen):
                model.outputs(model.module, moved)
        finally:
            for handle in handles:
                handle.remove()
        first += count
        if progress is not None:
            progress(index + 1, len(batches))
    return products


def _products(
    layers: Sequence[Layer], moments: bool | Collection[str], device: torch.device | str
) -> dict[str, OuterProducts]:
    """Empty sums of the layers whose moments are asked for, one object for layers that read the same tensor."""
    leader = leaders([layer for layer in layers if has_moments(layer)])
    asked = (leader.values() if moments else ()) if isinstance(moments, bool) else moments
    products: dict[str, OuterProducts] = {}
    for layer in layers:
        first = leader.get(layer.name)
        if first is not None and first in asked:
            products[layer.name] = products.get(first) or OuterProducts(
                layer.in_features, device, block_width(layer.in_features)
            )
    return products


def _leading(layers: Sequence[Layer], products: Collection[str]) -> dict[str, str]:
    """``{first layer that reads a summed tensor: its name in the importance}``, which knows layers without moments."""
    weighed = leaders(layers)
    own = leaders([layer for layer in layers if layer.name in products])
    return {name: weighed[name] for name in own.values()}


def _tokens(name: str, child: nn.Module, inputs: Tensor, count: int) -> Tensor:
    """The input vectors of a layer by sample; an error names the layer."""
    try:
        return input_tokens(child, inputs, count)
    except ModelError as error:
        raise ModelError(f"layer {name!r}: {error}; or exclude it (search.exclude)") from error


def _joined(layer: Layer, parts: Sequence[InputSample]) -> InputSample:
    """The rows of all batches; none, if no batch reached the layer."""
    if not parts:
        none = torch.empty(0, dtype=torch.int64)
        return InputSample(none, none, torch.empty(0, layer.groups * layer.in_features, dtype=torch.float16))
    return InputSample(*(torch.cat([getattr(part, field) for part in parts]) for field in ("sample", "token", "x")))


def _choose(tokens: Tensor, mask: TokenMask, share: int, first: int, generator: torch.Generator) -> InputSample:
    """``share`` random tokens per sample, fewer if fewer are unmasked."""
    count, length = tokens.shape[:2]
    order = torch.rand(count, length, generator=generator)
    own = counting(mask, tokens)
    if own is not None:
        order = torch.where(own.cpu(), order, torch.inf)
    picked = order.topk(min(share, length), dim=1, largest=False)
    sample, column = torch.isfinite(picked.values).nonzero(as_tuple=True)
    token = picked.indices[sample, column]
    x = tokens[sample.to(tokens.device), token.to(tokens.device)]
    x = x.float().clamp(-FLOAT16_LARGEST, FLOAT16_LARGEST).to(torch.float16).cpu()
    return InputSample(sample + first, token, x)
