"""Ranges per channel folded into LayerNorms and their readers (RepQ-ViT, arXiv 2212.08254; METHOD 8).

The channels of a LayerNorm's output differ widely: one range for all of them wastes most codes. Ranges per channel
(s, z) become one range for all, ``s̄ = mean(s)``, ``z̄ = mean(z)``, after the change of variables ``x = r ∘ (x' + b)``
with ``r = s / s̄``, ``b = (z̄ - z) s̄``, which is folded into the LayerNorm and the layers that read it:

    γ' = γ / r,  β' = β / r - b;     W' = W diag(r),  bias' = bias + W' b.

The float function is unchanged if nothing else reads the LayerNorm's output. This is tested, not guessed from names:
readers are the layers whose inputs have the same least and largest values per channel, and a fold is kept only if
random r and b change neither the output nor the input of any other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlorq.activations.plan import Fold
from mlorq.activations.quantizers import UniformQuantizer, fit_channels, fit_uniform
from mlorq.models.base import FloatModel
from mlorq.models.batches import take_samples
from mlorq.models.copying import copy_module
from mlorq.models.direct import weight_of
from mlorq.models.layer_list import Layer
from mlorq.models.observe import first_argument

UNCHANGED = 1e-4  # largest change of a tensor, relative to its norm, in float32
FEW = 4  # samples per batch on which folds are tested
SHAPES = 4  # largest number of batches, of different shapes, on which folds are tested


class FittedFold(NamedTuple):
    """The change of variables of a fold, and the quantizer of the readers' new input.

    Attributes:
        quantizer: quantizer of x', one range for all channels.
        scale: r, ``(channels,)`` float32 on the CPU.
        shift: b, same shape; zeros where a reader has no bias.
    """

    quantizer: UniformQuantizer
    scale: Tensor
    shift: Tensor

    def folded(self, tokens: Tensor) -> Tensor:
        """``x' = x / r - b`` of tokens ``(tokens, channels)``."""
        return tokens / self.scale.to(tokens.device) - self.shift.to(tokens.device)


def fit_fold(module: nn.Module, fold: Fold, tokens: Tensor, bits: int, percentiles: Sequence[float]) -> FittedFold:
    """Ranges (s, z) per channel as one range for all channels, ``(s̄, z̄)``, with ``r = s / s̄`` and ``b = (z̄ - z) s̄``.

    If a reader has no bias to absorb it, the shift is zero, and the range of ``x / r`` is searched again.

    Args:
        module: the model, for its readers' biases.
        fold: the LayerNorm and its readers.
        tokens: x, ``(tokens, channels)``.
        bits: bit-width of the codes.
        percentiles: upper percentiles p of the ranges (1-p, p) tried.
    """
    channels = fit_channels(tokens, bits, percentiles)
    level, zero = channels.scale.mean(), channels.zero.mean()
    scale = channels.scale / level
    if has_bias(module, fold):
        shift = (zero - channels.zero) * level
        return FittedFold(UniformQuantizer(bits, level, zero), scale.cpu(), shift.cpu())
    return FittedFold(fit_uniform(tokens / scale, bits, percentiles), scale.cpu(), torch.zeros_like(scale).cpu())


def fold_norm(module: nn.Module, fold: Fold, scale: Tensor, shift: Tensor) -> None:
    """Fold ``x = r ∘ (x' + b)`` into a LayerNorm and its readers, in place.

    Args:
        module: the model.
        fold: the LayerNorm and its readers.
        scale: r, ``(channels,)``, positive.
        shift: b, ``(channels,)``; zeros where a reader has no bias.
    """
    norm = module.get_submodule(fold.norm)
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)  # noqa: PT018
    r, b = scale.to(weight.device).double(), shift.to(weight.device).double()
    with torch.no_grad():
        weight.copy_(weight.double() / r)
        bias.copy_(bias.double() / r - b)
        for name in fold.layers:
            layer = module.get_submodule(name)
            matrix, own = weight_of(layer), layer.bias
            moved = matrix.double() * r
            matrix.copy_(moved)
            if isinstance(own, Tensor):
                own.copy_(own.double() + moved @ b)


def has_bias(module: nn.Module, fold: Fold) -> bool:
    """Whether all readers have a bias, which can absorb a shift."""
    return all(isinstance(module.get_submodule(name).bias, Tensor) for name in fold.layers)


def find_folds(model: FloatModel, layers: Sequence[Layer], batches: Sequence[Any], seed: int = 0) -> list[Fold]:
    """The LayerNorms of a model that can be folded.

    Args:
        model: the float model, on the batches' device.
        layers: the compressible layers.
        batches: some samples; folds are tested on one batch per shape, at most ``SHAPES``. The shape determines the
            padding inside a model (of windows, for example), and padding between a LayerNorm and its reader forbids
            a shift.
        seed: seed of the random changes.
    """
    by_shape = {_shape(batch): batch for batch in reversed(batches)}
    few = [take_samples(batch, slice(0, FEW)) for batch in list(by_shape.values())[-SHAPES:]]
    found_in_all = [set(_by_channel(model, layers, batch)) for batch in few]
    candidates = [fold for fold in _by_channel(model, layers, few[0]) if all(fold in own for own in found_in_all)]
    expected = [_seen(model, model.module, layers, batch) for batch in few]

    def holds(folds: Sequence[Fold]) -> bool:
        module = copy_module(model.module)
        generator = torch.Generator().manual_seed(seed)
        for fold in folds:
            weight = module.get_submodule(fold.norm).weight
            assert isinstance(weight, Tensor)
            scale = torch.randn(len(weight), generator=generator).mul(0.3).exp()
            shift = torch.randn(len(weight), generator=generator) * 0.3 * float(has_bias(module, fold))
            fold_norm(module, fold, scale, shift)
        changed = {name for fold in folds for name in fold.layers}
        for batch, seen in zip(few, expected, strict=True):
            found = _seen(model, module, layers, batch)
            pairs = [(found[name], value) for name, value in seen.items() if name not in changed]
            if not all(bool((new - old).norm() <= UNCHANGED * old.norm()) for new, old in pairs):
                return False
        return True

    if not candidates or holds(candidates):
        return candidates
    return [fold for fold in candidates if holds([fold])]


def _shape(batch: Any) -> tuple[Any, ...]:
    """The shapes of a batch's tensors without the axis of the samples."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape[1:])
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return tuple(_shape(value) for value in values)


def _seen(model: FloatModel, module: nn.Module, layers: Sequence[Layer], batch: Any) -> dict[str, Tensor]:
    """Inputs of every layer, and the output: the output alone may be insensitive to changes inside the model."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: found.__setitem__(name, first_argument(args, kwargs).float())

    handles = [
        module.get_submodule(layer.name).register_forward_pre_hook(hook(layer.name), with_kwargs=True)
        for layer in layers
    ]
    try:
        with torch.no_grad():
            found["output"] = model.outputs(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _by_channel(model: FloatModel, layers: Sequence[Layer], batch: Any) -> list[Fold]:
    """LayerNorms with the linear layers whose inputs have the same least and largest values per channel."""
    norms: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def span(values: Tensor) -> Tensor:
        tokens = values.reshape(-1, values.shape[-1])
        return torch.stack([tokens.amin(0), tokens.amax(0)])

    handles = []
    for name, child in model.module.named_modules():
        if isinstance(child, nn.LayerNorm) and child.weight is not None and child.bias is not None:

            def after(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                norms[name] = span(output)

            handles.append(child.register_forward_hook(after))
    for layer in layers:
        if layer.kind == "linear" and not layer.aliases:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = layer.name) -> None:
                calls[name] = calls.get(name, 0) + 1
                inputs[name] = span(first_argument(args, kwargs))

            child = model.module.get_submodule(layer.name)
            handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            model.outputs(model.module, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, values in norms.items():
        readers = tuple(
            layer
            for layer, seen in inputs.items()
            if calls[layer] == 1 and seen.shape == values.shape and torch.equal(seen, values)
        )
        if readers and calls[name] == 1:
            found.append(Fold(name, readers))
    return found
