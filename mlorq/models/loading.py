"""Float models of any family: loaded from a configuration, taken from memory, rebuilt from a description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mlorq.errors import CheckpointError, ModelError
from mlorq.models.base import FloatModel, Forward, attention_mask, call_module
from mlorq.models.custom import own_architecture
from mlorq.models.family import FAMILIES, ModelSection
from mlorq.models.residual_rotation import rotate_residual_stream


def load_model(config: ModelSection, folder: str = "") -> FloatModel:
    """Load the float model that a configuration names.

    Args:
        config: the ``model`` section.
        folder: where relative paths start.

    Raises:
        ModelError: the model, its weights or its code cannot be loaded.
    """
    model = FAMILIES[config.family].load(config.own, dtype=config.dtype, folder=folder)
    if config.rotation is None:
        return model
    rotate_residual_stream(model.module, config.rotation)
    return replace(model, key="")  # of the weights as they are now


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """A module of a described architecture, with weights yet to be loaded; needs no network.

    Raises:
        CheckpointError: the family cannot rebuild modules from a description, or is not installed.
    """
    family = str(architecture.get("family"))
    if family not in FAMILIES:
        raise CheckpointError(f"model family {family!r} is not installed: install it, or pass model=instance")
    return FAMILIES[family].rebuild(architecture)


def from_module(module: nn.Module, forward: Forward | None = None) -> FloatModel:
    """A module in memory as a float model; parameters stay where and what they are.

    Args:
        module: any ``nn.Module``.
        forward: ``forward(module, batch)`` gives the output tensor, samples first; default: call the module.

    Raises:
        ModelError: it has no floating parameters.
    """
    floating = [value for value in module.parameters() if value.is_floating_point()]
    if not floating:
        raise ModelError("the model has no floating parameters")
    families = list(FAMILIES)
    for family in families:
        family.mark(module)
    # Instances of the libraries' own models are described as such, so that their checkpoints load by themselves.
    described = (family.describe(module) for family in families)
    architecture = next((found for found in described if found is not None), None) or own_architecture(module)
    return FloatModel(
        module, architecture["family"], architecture, forward or call_module, attention_mask, dtype=floating[0].dtype
    )
