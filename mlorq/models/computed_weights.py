"""Weights that a layer computes on every access or call: weight norm, spectral norm, pruning, parametrizations.

In eval mode they are functions of the parameters alone, so that a layer with the value in their place has the same
function, and can be compressed like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from mlorq.models.kinds import CLASSES


def merge_computed_weights(module: nn.Module, merged: Collection[str] | None = None) -> None:
    """Replace weights and biases that linear layers and convolutions compute by their values, in place.

    Those that have another value at each access (random ones) stay as they are.

    Args:
        module: the model, in eval mode.
        merged: names of all tensors of a checkpoint: only those that it has as plain tensors are replaced, by values
            that are still to be read. None: all, by their present values.
    """
    for path, layer in list(module.named_modules()):
        names = computed_tensors(layer) if isinstance(layer, CLASSES) else []
        if not names:
            continue
        if all(f"{path}.{name}" in merged for name in names) if merged is not None else _are_fixed(layer):
            _merge_hooks(layer)
            _merge_parametrizations(layer)


def computed_tensors(layer: nn.Module) -> list[str]:
    """Names of the tensors of a layer that hooks or parametrizations compute."""
    return [*_parametrized(layer), *(name for name, _ in _hooks(layer))]


def merged_tensors(module: nn.Module, original: nn.Module) -> list[str]:
    """Names of tensors that the layers of another instance compute, and that are plain in this module's.

    Args:
        module: the module, float or compressed.
        original: a new instance of its class.
    """
    own = dict(module.named_modules(remove_duplicate=False))
    return [
        f"{path}.{name}"
        for path, layer in original.named_modules(remove_duplicate=False)
        if isinstance(layer, CLASSES) and path in own
        for name in computed_tensors(layer)
        if name not in computed_tensors(own[path])
    ]


def _parametrized(layer: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(layer):
        return []
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    return list(layer.parametrizations)


def _hooks(layer: nn.Module) -> Iterator[tuple[str, object]]:
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook.name, hook
        elif isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name, hook


def _are_fixed(layer: nn.Module) -> bool:
    """Whether two computations of a layer's tensors give the same values; hooks of torch read parameters alone."""
    with torch.no_grad():
        return all(torch.equal(getattr(layer, name), getattr(layer, name)) for name in _parametrized(layer))


def _merge_hooks(layer: nn.Module) -> None:
    for name, hook in list(_hooks(layer)):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, name)
            _forget_spectral_norm(layer)
        else:
            prune.remove(layer, name)
        getattr(layer, name).requires_grad_(False)


def _forget_spectral_norm(layer: nn.Module) -> None:
    """Remove the hook that looks for its tensors in a state dict; torch wraps it and then does not find it."""
    hooks = layer._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _merge_parametrizations(layer: nn.Module) -> None:
    names = _parametrized(layer)
    if not names:
        return
    with torch.no_grad():
        values = {name: getattr(layer, name).detach().clone() for name in names}
    # Not by ``remove_parametrizations``, which changes the class: copies of a parametrized layer share it.
    layer.__class__ = type(layer).__mro__[1]
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
