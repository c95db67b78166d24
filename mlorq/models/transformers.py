"""Models of transformers: classifiers, sentence encoders with the pooling of their folder, and detectors."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from mlorq.artifacts.locations import is_remote, resolve_location
from mlorq.config.run import ModelConfig
from mlorq.errors import CheckpointError, ModelError
from mlorq.models.base import Batch, FloatModel, attention_mask, same_construction
from mlorq.models.sentence import read_embedding, rebuilt, with_dense
from mlorq.models.transformers_detection import OUTPUTS, mark_samples

# What a configuration says about its origin and not about its function.
NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def load(config: ModelConfig, folder: str = "") -> FloatModel:
    """Load a model and its weights from a folder, a package's folder, or the hub.

    Raises:
        ModelError: there is no such model, or its weights do not fit.
    """
    location = encoder = locate(config, folder)
    embedding = None
    if config.task == "sentence-similarity" and os.path.isdir(location):
        embedding = read_embedding(location, config.name or "")
        location = os.path.join(location, embedding.inside)
    dtype = getattr(torch, config.dtype)
    auto = _auto_class(config.task)
    arguments = dict(config.arguments)
    try:
        with _quiet():
            settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
            if config.task in OUTPUTS:
                # Convolutional backbones know of no fused attention, and refuse to be asked for it.
                settings["attn_implementation"] = "eager"
            module, info = auto.from_pretrained(location, **settings, **arguments)
            missing = info.get("missing_keys") or ()
            if config.task == "sentence-similarity" and missing and all(str(k).startswith("pooler.") for k in missing):
                # What is made of the tokens uses no pooler, and many sentence encoders are stored without one.
                arguments["add_pooling_layer"] = False
                module, info = auto.from_pretrained(location, **settings, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, safetensors.SafetensorError) as error:
        raise ModelError(f"model {config.name!r} cannot be loaded: {_one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        for key in sorted(info.get(problem) or (), key=str):
            name = key if isinstance(key, str) else key[0]
            raise ModelError(f"model {config.name!r}: tensor {name!r} is {problem.split('_')[0]} in its weights")
    mark_samples(module)
    architecture: dict[str, Any] = {
        "family": "transformers",
        "task": config.task,
        # Fused where the architecture can, which not all can (MPNet).
        "attention": module.config._attn_implementation,
        "config": _described(module),
    }
    # Arguments of the constructor, unlike those that change the configuration, are described nowhere else.
    known = inspect.signature(type(module)).parameters
    if own := {name: value for name, value in arguments.items() if name in known}:
        architecture["arguments"] = _plain(own)
    if config.task == "sentence-similarity" and embedding is None:
        # On the hub transformers are not in subfolders; asked for only now, as the hub is there.
        embedding = read_embedding(location, config.name or "")
    if embedding is not None:
        architecture |= embedding.described()
        if embedding.dense:
            module = with_dense(module, embedding, encoder, config.name or "")
    return FloatModel(
        module,
        "transformers",
        architecture,
        embedding or OUTPUTS.get(config.task or "", classification_logits),
        attention_mask,
        block_names(module),
        dtype,
    )


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The module of an architecture, without its weights.

    Raises:
        CheckpointError: this version of transformers does not know it.
    """
    import transformers
    from transformers import AutoConfig

    described = dict(architecture["config"])
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    name = architecture.get("class")
    auto = _auto_class(architecture["task"]) if name is None else getattr(transformers, name, None)
    if auto is None:
        raise CheckpointError(f"this version of transformers has no model class {name!r}")
    build = auto.from_config if name is None else auto._from_config
    with _quiet():
        module = build(config, attn_implementation=architecture["attention"], **architecture.get("arguments", {}))
    assert isinstance(module, nn.Module)
    return rebuilt(module, architecture)


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The architecture of an instance of one of transformers' own classes, where it rebuilds to its like; else None."""
    transformers = sys.modules.get("transformers")  # without it there can be no such instance
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    if getattr(transformers, type(module).__name__, None) is not type(module):
        return None
    architecture = {
        "family": "transformers",
        "task": None,
        "class": type(module).__name__,
        "attention": module.config._attn_implementation,
        "config": _described(module),
    }
    if getattr(module, "pooler", 0) is None:
        architecture["arguments"] = {"add_pooling_layer": False}
    try:
        with torch.random.fork_rng(devices=[]):
            twin = rebuild(architecture)
    except (CheckpointError, TypeError, ValueError, KeyError, ImportError):
        return None
    return architecture if same_construction(module, twin) else None


def tokenizer(config: ModelConfig, folder: str = "") -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet():
            location = locate(config, folder)
            if config.task == "sentence-similarity" and os.path.isdir(location):
                location = os.path.join(location, read_embedding(location, config.name or "").inside)
            return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {config.name!r}: its tokenizer cannot be loaded: {_one_line(error)}") from error


def class_names(config: ModelConfig, folder: str = "") -> list[str]:
    """What a classifier's configuration calls its classes, in the order of its outputs; one: a regressor.

    Raises:
        ModelError: there is no configuration.
    """
    from transformers import AutoConfig

    try:
        with _quiet():
            found = AutoConfig.from_pretrained(locate(config, folder), **config.arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {config.name!r}: its configuration cannot be loaded: {_one_line(error)}") from error
    return [str(found.id2label.get(index, index)) for index in range(found.num_labels)]


def locate(config: ModelConfig, folder: str = "") -> str:
    """What a model's name means: a folder, a folder inside an installed package, or a hub name.

    Raises:
        ModelError: a relative or absolute path that does not exist.
    """
    assert config.name is not None
    path = resolve_location(config.name, folder)
    if is_remote(config.name) or (is_remote(folder) and config.name.startswith(".")):
        raise ModelError(f"model folder {path} is not on this machine: copy it here, or use a hub name")
    if os.path.isdir(path):
        return path
    package, _, inside = config.name.partition("/")
    if inside and package.isidentifier() and (spec := importlib.util.find_spec(package)) is not None:
        for root in spec.submodule_search_locations or ():
            if os.path.isdir(os.path.join(root, inside)):
                return os.path.join(root, inside)
    if config.name.startswith((".", "/", "~")):
        raise ModelError(f"model folder {path} does not exist")
    return config.name


def classification_logits(module: nn.Module, batch: Batch) -> Tensor:
    """Logits, ``(samples, classes)``."""
    logits: Tensor = module(**batch).logits
    return logits


def block_names(module: nn.Module) -> list[str]:
    """The encoder's layers in execution order; empty where they are not found by name."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and name.endswith(("encoder.layer", "transformer.layer")):
            return [f"{name}.{index}" for index in range(len(child))]
    return []


def _described(module: Any) -> dict[str, Any]:
    """A model's configuration as JSON values, without what tells only of its origin."""
    found = module.config.to_dict()
    plain: dict[str, Any] = _plain({name: value for name, value in found.items() if name not in NOT_ARCHITECTURE})
    return plain


def _auto_class(task: str | None) -> Any:
    import transformers

    names = {
        "text-classification": "AutoModelForSequenceClassification",
        "object-detection": "AutoModelForObjectDetection",
        "instance-segmentation": "AutoModelForUniversalSegmentation",
    }
    return getattr(transformers, names.get(task or "", "AutoModel"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors are reported by exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _plain(value: Any) -> Any:
    """JSON values: string keys, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
