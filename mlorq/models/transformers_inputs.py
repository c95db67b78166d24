"""Inputs of an architecture from transformers: their names and sizes, and random inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mlorq.errors import CheckpointError
from mlorq.models.batches import Batch
from mlorq.models.transformers_modules import auto_class

TOKENS = 16  # length of a random text
# Architectures whose positions start after that of the padding token, which is given here or in the configuration.
FROM_PADDING = {"mpnet": 1} | dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta", "camembert"))
SIDE = 224  # side of a random image, if the architecture accepts any size


def described_inputs(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, names and sizes of the inputs of an architecture, as JSON values.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class.
    """
    names = input_names(architecture)
    config = architecture["config"]
    if "input_ids" not in names:
        return {"kind": "image", "inputs": names, **_image_size(config)}
    sizes = {"vocabulary": config.get("vocab_size"), "max_length": longest_text(config)}
    return {"kind": "text", "inputs": names, **sizes}


def input_names(architecture: Mapping[str, Any]) -> list[str]:
    """The keys of a batch of an architecture.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class.
    """
    kind = _module_class(architecture)
    taken = inspect.signature(kind.forward).parameters
    if kind.main_input_name != "input_ids":
        return [name for name in (kind.main_input_name, "pixel_mask") if name in taken]
    types = (architecture["config"].get("type_vocab_size") or 0) > 1 and "token_type_ids" in taken
    return ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]


def random_inputs(architecture: Mapping[str, Any], samples: int) -> Batch:
    """A random batch from a fixed seed, without padding.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class.
    """
    config = architecture["config"]
    names = input_names(architecture)
    generator = torch.Generator().manual_seed(0)
    if "input_ids" in names:
        length = min(TOKENS, (config.get("max_position_embeddings") or TOKENS) // 2)
        shape = (samples, max(1, length))
        tokens = torch.randint(0, config["vocab_size"] - 1, shape, generator=generator)
        padding = config.get("pad_token_id")
        if padding is not None:  # shifts tokens from the padding token on by one, so that it does not occur
            tokens = tokens + (tokens >= padding)
        made = {"input_ids": tokens, "attention_mask": torch.ones(shape, dtype=torch.int64)}
        return made | ({"token_type_ids": torch.zeros(shape, dtype=torch.int64)} if "token_type_ids" in names else {})
    size = _image_size(config)
    pixels = torch.randn(samples, size["channels"], size["height"], size["width"], generator=generator)
    mask = torch.ones(samples, size["height"], size["width"], dtype=torch.int64)
    return {"pixel_values": pixels} | ({"pixel_mask": mask} if "pixel_mask" in names else {})


def longest_text(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest text; None if the architecture has no limit."""
    positions = config.get("max_position_embeddings")
    if positions is None or config.get("model_type") not in FROM_PADDING:
        return positions
    padding = FROM_PADDING[config["model_type"]]
    if padding is None:
        padding = config.get("pad_token_id") or 0
    return int(positions) - padding - 1


def _image_size(config: Mapping[str, Any]) -> dict[str, int]:
    backbone = config.get("backbone_config") or {}
    size = config.get("image_size") or backbone.get("image_size") or SIDE
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.get("num_channels") or backbone.get("num_channels") or 3
    return {"channels": channels, "height": height, "width": width}


def _module_class(architecture: Mapping[str, Any]) -> Any:
    import transformers
    from transformers import AutoConfig

    name = architecture.get("class")
    if name is not None:
        found = getattr(transformers, name, None)
        if found is None:
            raise CheckpointError(f"this version of transformers has no model class {name!r}")
        return found
    kind = type(AutoConfig.for_model(architecture["config"]["model_type"]))
    found = auto_class(architecture["task"])._model_mapping.get(kind, None)
    if found is None:
        raise CheckpointError(f"this version of transformers has no {architecture['task']} model of {kind.__name__}")
    return found[0] if isinstance(found, (tuple, list)) else found
