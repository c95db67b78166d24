"""Model families: one file each, one line in the registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mlorq.config.run import ModelConfig
from mlorq.errors import CheckpointError
from mlorq.models import custom, detection, timm, transformers
from mlorq.models.base import FloatModel
from mlorq.models.custom import from_module
from mlorq.models.known import known_models
from mlorq.models.residual_rotation import rotate_residual_stream

__all__ = ["FloatModel", "from_module", "known_models", "load_model", "rebuild"]

FAMILIES = {"timm": timm, "transformers": transformers, "detection": detection, "custom": custom}


def load_model(config: ModelConfig, folder: str = "") -> FloatModel:
    """Load the float model that a configuration names.

    Args:
        config: the ``model`` section.
        folder: where relative paths start.

    Raises:
        ModelError: the model, its weights or its code cannot be loaded.
    """
    model: FloatModel = FAMILIES[config.family].load(config, folder)
    if config.rotation is None:
        return model
    rotate_residual_stream(model.module, config.rotation)
    return replace(model, key="")  # of the weights as they are now


def rebuild(architecture: dict[str, Any]) -> nn.Module:
    """A module of a described architecture, with weights yet to be loaded; needs no network.

    Raises:
        CheckpointError: the family cannot rebuild modules from a description.
    """
    family = architecture.get("family")
    if family == "timm":
        return timm.rebuild(architecture)
    if family == "transformers":
        return transformers.rebuild(architecture)
    if family == "detection":
        return detection.rebuild(architecture)
    raise CheckpointError(f"a model of family {family!r} cannot rebuild itself: pass model=instance")
