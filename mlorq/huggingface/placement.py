"""Placement of a checkpoint's compressed layers and activation quantizers in a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from mlorq.activations.plan import ActivationPlan, Site
from mlorq.checkpoint.entry import LayerEntry, dtype_of
from mlorq.errors import ModelError
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import compressed_class, install
from mlorq.models.direct import weight_of

Rename = Callable[[str], str | None]


def renaming(model: Any) -> Rename:
    """A function from a stored name of a module or tensor to its name in ``model``; None if the model lacks it.

    The names of an encoder with a head (``bert.encoder…``) have a prefix that those of the encoder alone lack.

    Args:
        model: an instance of a class of transformers.
    """
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def rename(name: str) -> str | None:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in known), None)

    return rename


def renamed_entry(entry: LayerEntry, rename: Rename) -> LayerEntry | None:
    """The entry with the names of its layer in a model; None if the model lacks the layer."""
    paths = [path for path in map(rename, (entry.layer, *entry.aliases)) if path is not None]
    return replace(entry, layer=paths[0], aliases=tuple(paths[1:])) if paths else None


def renamed_plan(plan: ActivationPlan, rename: Rename) -> ActivationPlan:
    """The plan with the names in a model, without the quantizers of layers and modules that the model lacks."""
    sites: list[Site] = []
    for site in plan.sites:
        name, mark, operand = site.name.rpartition("#")
        if site.layers:
            layers = tuple(path for path in map(rename, site.layers) if path is not None)
            sites += [replace(site, layers=layers)] if layers else []
        elif (owner := rename(name)) is not None:
            sites.append(replace(site, name=f"{owner}{mark}{operand}"))
    found = ((rename(mlp.activation), mlp) for mlp in plan.mlps)
    mlps = [replace(mlp, activation=name) for name, mlp in found if name is not None]
    return replace(plan, sites=sites, mlps=mlps)


def install_entry(model: nn.Module, entry: LayerEntry, *, own_dtype: bool) -> None:
    """Replace a float layer under all its names by an empty compressed one.

    Args:
        model: the model, on any device.
        entry: the layer.
        own_dtype: whether the layer computes in the dtype of its entry, or in that of the float layer.

    Raises:
        ModelError: the layer has another class or shape.
    """

    def make(layer: nn.Module, path: str) -> CompressedModule:
        kind, weight = compressed_class(layer, path), weight_of(layer)
        if kind.kind != entry.kind or tuple(weight.shape) != entry.shape:
            raise ModelError(
                f"layer {path!r} is {kind.kind} {tuple(weight.shape)} in the model, "
                f"but {entry.kind} {entry.shape} in quantization_config"
            )
        new = kind.placeholder(layer, path, entry.candidate, entry.zero_point)
        if own_dtype:
            new.compute_dtype = dtype_of(entry.dtype)
        return new

    install(model, entry.layer, (entry.layer, *entry.aliases), make)


def compressed_modules(model: nn.Module) -> list[CompressedModule]:
    """The compressed layers of a model, each once."""
    return [module for module in model.modules() if isinstance(module, CompressedModule)]
