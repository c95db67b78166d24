"""Float models of any family: loaded from a configuration, wrapped from an instance, rebuilt from a description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mlorq.errors import CheckpointError, MlorqError, ModelError, no_secrets, one_line
from mlorq.models.base import FloatModel, Forward, attention_mask, call_module, check_readable
from mlorq.models.custom import own_architecture
from mlorq.models.family import FAMILIES, ModelSection
from mlorq.models.offload import offload
from mlorq.models.residual_rotation import rotate_residual_stream
from mlorq.models.text_outputs import CHOOSERS, choice_masks


@no_secrets()
def load_model(config: ModelSection, folder: str = "") -> FloatModel:
    """The float model of a configuration, with its weights, rotated if ``rotation`` is set.

    Inside ``offloading`` (``mlorq.models.offload``) its weights are in a file.

    Args:
        config: the ``model`` section.
        folder: folder that relative paths start from.

    Raises:
        ModelError: the model, its weights or its code cannot be loaded.
    """
    model = FAMILIES[config.family].load(config.own, dtype=config.dtype, folder=folder)
    offload(model.module)
    if config.rotation is None:
        return model
    rotate_residual_stream(model.module, config.rotation)
    return replace(model, key="")  # computes the key of the rotated weights


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The module of an architecture, with weights yet to be loaded; needs no network.

    Raises:
        CheckpointError: the family is not installed or cannot rebuild modules from a description, or the description is
            malformed or names what it must not (``ModelFamily.rebuild``).
        ModelError: the installed version of a library does not have the model.
    """
    family = str(architecture.get("family"))
    if family not in FAMILIES:
        raise CheckpointError(f"model family {family!r} is not installed: install it, or pass model=instance")
    try:
        return FAMILIES[family].rebuild(architecture)
    except MlorqError:
        raise
    except Exception as error:  # constructors of libraries raise anything for values that they did not expect
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"its {family} model cannot be rebuilt: {problem}") from error


def from_module(module: nn.Module, forward: Forward | None = None) -> FloatModel:
    """A float model around a module; device and dtypes of its parameters stay.

    Inputs are cast to the dtype that most of the parameters' entries have.

    Args:
        module: any ``nn.Module``.
        forward: ``forward(module, batch)`` returns the output tensor, samples first; default: call the module.

    Raises:
        ModelError: the module has no floating-point parameters, or its state cannot be read (``check_readable``).
    """
    check_readable(module)
    entries: Counter[torch.dtype] = Counter()
    for value in module.parameters():
        if value.is_floating_point():
            entries[value.dtype] += value.numel()
    if not entries:
        raise ModelError("the model has no floating-point parameters")
    dtype, _ = entries.most_common(1)[0]
    families = list(FAMILIES)
    for family in families:
        family.mark(module)
    # Instances of a library's models get the library's architecture, so that checkpoints load without an instance.
    described = (family.describe(module) for family in families)
    architecture = next((found for found in described if found is not None), None) or own_architecture(module)
    masks = partial(choice_masks, module) if type(module).__name__.endswith(CHOOSERS) else attention_mask
    return FloatModel(module, architecture["family"], architecture, forward or call_module, masks, dtype=dtype)
