"""Modules from transformers: loading, and description as an architecture."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import safetensors
import torch
from torch import nn

from mlorq.artifacts.hashing import digest_json
from mlorq.errors import CheckpointError, ModelError
from mlorq.models.base import FloatModel, attention_mask, same_construction
from mlorq.models.float_files import in_dtype
from mlorq.models.hub_names import load_problem
from mlorq.models.image_processor import prepared_size
from mlorq.models.offload import is_offloading, offload
from mlorq.models.plain import ORIGIN, encoded_float, without_faults
from mlorq.models.preparation import preparation_files
from mlorq.models.sentence import read_embedding, with_dense
from mlorq.models.tasks import BOXES, DEPTHS, MAPS, MASKED, NEXT, PAIRS, TASKS
from mlorq.models.transformers import NAME, TransformersSettings, locate, quiet
from mlorq.models.transformers_detection import chooses_positions, mark_samples
from mlorq.models.transformers_rebuild import ATTENTION, LABELS, rebuild

# Entries of a configuration that do not affect the function of the model.
NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def load(settings: TransformersSettings, dtype: str, folder: str) -> FloatModel:
    """The model with its weights, from a folder, a folder inside a package, or the hub.

    Args:
        settings: settings of the model.
        dtype: name of the dtype that the model runs in.
        folder: folder that relative paths start from.

    Raises:
        ModelError: the model does not exist, or its weights do not fit.
    """
    task = TASKS[settings.task or PAIRS]
    location = encoder = locate(settings, folder)
    embedding = None
    if settings.task == PAIRS and os.path.isdir(location):
        embedding = read_embedding(location, settings.name or "")
        location = os.path.join(location, embedding.inside)
    as_dtype = getattr(torch, dtype)
    arguments = dict(settings.arguments)
    try:
        with ExitStack() as stack:
            stack.enter_context(quiet())
            auto = auto_class(settings.task, location if task.other_auto else None)
            options: dict[str, Any] = {"dtype": as_dtype, "output_loading_info": True}
            files = location
            if is_offloading():
                files = stack.enter_context(in_dtype(location, as_dtype, arguments))
            if task.eager:
                # Convolutional backbones have no fused attention and raise an error if it is requested.
                options["attn_implementation"] = "eager"
            module, info = auto.from_pretrained(files, **options, **arguments)
            missing = info.get("missing_keys") or ()
            if settings.task == PAIRS and missing and all(str(k).startswith("pooler.") for k in missing):
                # Embeddings do not use the pooler, and many sentence encoders are stored without one.
                arguments["add_pooling_layer"] = False
                module, info = auto.from_pretrained(files, **options, **arguments)
            offload(module)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, safetensors.SafetensorError) as error:
        raise ModelError(f"model {settings.name!r} cannot be loaded: {load_problem(error, location)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        for key in sorted(info.get(problem) or (), key=str):
            name = key if isinstance(key, str) else key[0]
            raise ModelError(f"model {settings.name!r}: tensor {name!r} is {problem.split('_')[0]} in its weights")
    mark_samples(module)
    architecture: dict[str, Any] = {
        "family": NAME,
        "task": settings.task,
        # Fused if the architecture supports it (MPNet does not).
        "attention": _attention(module),
        "config": _described(module),
    }
    if task.name in (MAPS, DEPTHS) and (size := prepared_size(location, settings.name or location)):
        architecture["input_size"] = size  # that of the configuration is another one, if there is one at all
    # Arguments that change the configuration are stored in it; those of the constructor are stored here.
    known = inspect.signature(type(module)).parameters
    if own := {name: value for name, value in arguments.items() if name in known}:
        architecture["arguments"] = _plain(own)
    if settings.task == PAIRS and embedding is None:
        # On the hub the transformer is not in a subfolder; read after the load, which has shown that the hub answers.
        embedding = read_embedding(location, settings.name or "")
    if embedding is not None:
        architecture |= embedding.described()
        if embedding.dense:
            module = with_dense(module, embedding, encoder, settings.name or "")
    own_masks = task.token_mask()
    found = FloatModel(
        module,
        NAME,
        architecture,
        embedding or task.forward(),
        attention_mask if own_masks is None else partial(own_masks, module),
        block_names(module),
        as_dtype,
        preparation=cache(partial(preparation_files, settings, folder)),
    )
    if task.name in (NEXT, MASKED):
        found.key = digest_json([found.key, "outputs at tokens"])  # before, f(x) had logits of padding
    if task.name == BOXES and chooses_positions(module):
        found.key = digest_json([found.key, "outputs by position"])  # before, f(x) compared queries by their number
    return found


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The architecture of an instance of a class from transformers; None if it does not rebuild to an identical one."""
    transformers = sys.modules.get("transformers")  # if it is not imported, there is no such instance
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    if getattr(transformers, type(module).__name__, None) is not type(module):
        return None
    architecture = {
        "family": NAME,
        "task": None,
        "class": type(module).__name__,
        "attention": _attention(module),
        "config": _described(module),
    }
    if getattr(module, "pooler", 0) is None:
        architecture["arguments"] = {"add_pooling_layer": False}
    # A model with a backbone of its own may have chosen for each part: then the library chooses again.
    found: dict[str, Any] | None = None
    for attention in dict.fromkeys((architecture["attention"], None)):
        described = architecture | {"attention": attention}
        try:
            with torch.random.fork_rng(devices=[]):
                twin = rebuild(described)
        except (CheckpointError, TypeError, ValueError, KeyError, ImportError):
            continue
        if not same_construction(module, twin):
            return None
        if _implementations(module) == _implementations(twin):
            return described
        found = found or described
    return found


def _implementations(module: nn.Module) -> list[str | None]:
    """The implementation of attention in each part that has a configuration: other ones round differently."""
    configured = [part.config for part in module.modules() if hasattr(part, "config")]
    return [getattr(config, "_attn_implementation", None) for config in configured]


def block_names(module: nn.Module) -> list[str]:
    """Names of the encoder's layers in execution order; empty if there is no list of layers with a known name."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and name.endswith(("encoder.layer", "transformer.layer")):
            return [f"{name}.{index}" for index in range(len(child))]
    return []


def _attention(module: Any) -> str | None:
    """The implementation of attention; that of torch in place of one that needs further packages."""
    found: str | None = module.config._attn_implementation
    return found if found in ATTENTION else "sdpa"


def _described(module: Any) -> dict[str, Any]:
    """The configuration of a model as JSON values, without entries that say where it is from or how it is fetched."""
    found = module.config.to_dict()
    plain: dict[str, Any] = _plain({name: value for name, value in found.items() if name not in NOT_ARCHITECTURE})
    return without_faults(plain, free=(*LABELS, *ORIGIN))


def auto_class(task: str | None, location: str | None = None) -> Any:
    """The class of transformers that builds the models of a task.

    Args:
        task: name of the task; None or another name: ``AutoModel``.
        location: folder or hub name of a model, whose configuration chooses among two classes of the task; None: the
            first of them.

    Raises:
        OSError, ValueError, KeyError: the configuration cannot be loaded.
    """
    import transformers

    found = _auto_classes(task)
    if location is None or len(found) == 1:
        return found[0]
    kind = type(transformers.AutoConfig.from_pretrained(location))
    return next((auto for auto in found if kind in auto._model_mapping), found[0])


def model_class(task: str | None, kind: type) -> Any:
    """The class of a task's models with configurations of class ``kind``; None if there is none."""
    for auto in _auto_classes(task):
        found = auto._model_mapping.get(kind, None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def _auto_classes(task: str | None) -> list[Any]:
    import transformers

    names = (TASKS[task].auto, TASKS[task].other_auto) if task in TASKS else ("AutoModel",)
    return [getattr(transformers, name) for name in names if name]


def _plain(value: Any) -> Any:
    """A value as JSON: mappings with string keys, tuples as lists, other objects as strings."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return encoded_float(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
