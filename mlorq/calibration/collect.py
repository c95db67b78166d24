"""One pass over the calibration data: reference outputs and a bounded random sample of every layer's inputs.

Later statistics of activations start from the sample; every compressed model is compared with the reference outputs
(METHOD 5). Non-finite values are refused here, before hours of search.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.calibration.covariance import OuterProducts
from mlorq.calibration.token_importance import Importance, leaders
from mlorq.errors import ModelError
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
            empty without ``moments``. Grouped convolutions are left out: their rows see different inputs.
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
    moments: bool = False,
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
        moments: whether to sum the outer products of all inputs as well (METHOD 7).
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
    products: dict[str, OuterProducts] = {}
    leader = leaders([layer for layer in layers if layer.groups == 1] if moments else [])
    for layer in layers:
        if layer.name in leader:
            products[layer.name] = products.get(leader[layer.name]) or OuterProducts(layer.in_features, device)
    leading = set(leader.values())
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
                try:
                    tokens = input_tokens(child, inputs, count)
                except ModelError as error:
                    raise ModelError(f"layer {name!r}: {error}; or exclude it (search.exclude)") from error
                own = mask_for(name, mask, alone)
                kept[name].append(_choose(tokens, own, share, start, generator))
                if name in leading:
                    products[name].add(tokens, start, counting(own, tokens), weights.get(name))

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
