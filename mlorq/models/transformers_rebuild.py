"""Modules of transformers from an architecture: what a description may say, and the module that it describes.

A description is data from a file. Only classes of models that transformers itself has are built, by their constructors
alone: its ``Auto`` classes would run code that a configuration points to. Entries that make a constructor fetch,
import or unpickle something are refused, wherever they are (``mlorq.models.plain``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from mlorq.errors import CheckpointError
from mlorq.models import timm
from mlorq.models.plain import check_keys, decoded_floats, faults, without_origin
from mlorq.models.sentence import POOLINGS, rebuilt
from mlorq.models.sentence_dense import ACTIVATIONS
from mlorq.models.tasks import TASKS
from mlorq.models.transformers import quiet

OPTIONAL = ("class", "arguments", "input_size", "pooling", "normalised", "dense")
# Computed by torch alone. Others import packages, or fetch a kernel from the hub.
ATTENTION = (None, "eager", "sdpa", "flex_attention")
LABELS = ("id2label", "label2id", "task_specific_params")  # values can be any text
LARGEST = 2**14  # side of an image
_DENSE = {"in_features": int, "out_features": int, "bias": bool, "activation": str, "residual": bool}


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The module of an architecture, with weights yet to be loaded.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class, or the description says
            something that is not allowed.
    """
    from transformers import AutoConfig

    check(architecture)
    described = decoded_floats(without_origin(architecture["config"]))
    with quiet():
        config = AutoConfig.for_model(described.pop("model_type"), **described)
        kind = _class(architecture, config)
        inner = config.sub_configs.get("text_config")
        if inner is not None and getattr(kind, "config_class", None) is inner:
            config = config.get_text_config()  # as the Auto classes do
        arguments = architecture.get("arguments", {})
        for key, value in arguments.items():
            if key not in inspect.signature(kind).parameters or not isinstance(value, (bool, int, float, type(None))):
                raise CheckpointError(f"architecture.arguments: {key} {value!r:.60} is not allowed for {kind.__name__}")
        module = kind._from_config(config, attn_implementation=architecture["attention"], **arguments)
    assert isinstance(module, nn.Module)
    return rebuilt(module, architecture)


def check(architecture: Mapping[str, Any]) -> None:
    """Check that a description names nothing that would be fetched, imported or unpickled.

    Raises:
        CheckpointError: an entry is missing, unknown or refused; the message names it.
    """
    check_keys(architecture, {"family": str, "task": object, "attention": object, "config": dict}, OPTIONAL)
    if architecture["task"] not in (None, *TASKS):
        raise CheckpointError(f"architecture.task {architecture['task']!r:.60} is unknown")
    if architecture["attention"] not in ATTENTION:
        raise CheckpointError(f"architecture.attention {architecture['attention']!r:.60} is refused")
    if not isinstance(architecture.get("arguments", {}), dict):
        raise CheckpointError("architecture.arguments must be an object")
    size = architecture.get("input_size", [1, 1])
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(side) is int and 0 < side <= LARGEST for side in size)
    ):
        raise CheckpointError(f"architecture.input_size {size!r:.60} is not [height, width]")
    config = without_origin(architecture["config"])
    for reason in faults(config, free=LABELS):
        raise CheckpointError(f"architecture.config: {reason}")
    _check_config(config)
    _check_pooling(architecture)


def _check_config(config: Mapping[str, Any], inside: bool = False) -> None:
    """Check the model's type, and the names and arguments of models of timm in it."""
    if not inside and not isinstance(config.get("model_type"), str):
        raise CheckpointError("architecture.config lacks 'model_type'")
    wrapped = config.get("model_type") == "timm_wrapper" or bool(config.get("model_args"))
    if wrapped or config.get("model_type") == "timm_backbone":
        name = config.get("architecture" if wrapped else "backbone")
        if not isinstance(name, str):
            raise CheckpointError("architecture.config does not name its model of timm")
        timm.check_arguments(name, config.get("model_args") or {})
    elif config.get("backbone") is not None:
        # By its name alone, a backbone's configuration would be fetched.
        raise CheckpointError("architecture.config: 'backbone' is refused: describe it by backbone_config")
    for value in config.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                _check_config(inner, inside=True)


def _check_pooling(architecture: Mapping[str, Any]) -> None:
    pooling = architecture.get("pooling", [])
    dense = architecture.get("dense", [])
    if not isinstance(pooling, list) or any(mode not in POOLINGS for mode in pooling):
        raise CheckpointError(f"architecture.pooling {pooling!r:.60} is unknown")
    if not isinstance(dense, list) or (dense and not {"pooling", "normalised"} <= set(architecture)):
        raise CheckpointError("architecture.dense must be a list, with pooling and normalised")
    for layer in dense:
        if not isinstance(layer, dict) or any(
            key not in _DENSE or type(value) is not _DENSE[key] for key, value in layer.items()
        ):
            raise CheckpointError(f"architecture.dense: {layer!r:.60} is malformed")
        if layer.get("activation", "Tanh") not in ACTIVATIONS:
            raise CheckpointError(f"architecture.dense: activation {layer['activation']!r:.60} is unknown")


def _class(architecture: Mapping[str, Any], config: Any) -> Any:
    """The class of transformers that the description names, or that its task has for the configuration."""
    import transformers

    from mlorq.models.transformers_modules import model_class

    name = architecture.get("class")
    if name is None:
        found = model_class(architecture["task"], type(config))
        if found is None:
            raise CheckpointError(f"task {architecture['task']!r} has no model of type {config.model_type!r}")
        return found
    # Looked up in the library's own list, so that nothing is imported but a file of models.
    homes = getattr(transformers, "_class_to_module", {})
    if not isinstance(name, str) or not re.fullmatch(r"models\.\w+\.modeling_\w+", homes.get(name, "")):
        raise CheckpointError(f"this version of transformers has no model class {name!r:.60}")
    found = getattr(transformers, name)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise CheckpointError(f"{name} of transformers is not a model class")
    return found
