"""Inputs of an architecture from transformers: their names and sizes, and random inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlorq.errors import CheckpointError
from mlorq.models.batches import Batch
from mlorq.models.transformers_modules import auto_class
from mlorq.models.two_towers import IMAGE_INPUTS, PADDED, PADDED_LENGTH, TEXT_INPUTS, has_two_towers, text_inputs

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
        return {"kind": "image", "inputs": names, **_image_size(architecture)}
    if "pixel_values" in names:
        sizes = {"vocabulary": _text_config(config).get("vocab_size"), "max_length": _longest_caption(config)}
        texts = [name for name in names if name in TEXT_INPUTS]
        return {"kind": "image and text", "inputs": names, "text_inputs": texts, **_image_size(architecture), **sizes}
    sizes = {"vocabulary": config.get("vocab_size"), "max_length": longest_text(config)}
    return {"kind": "text", "inputs": names, **sizes}


def input_names(architecture: Mapping[str, Any]) -> list[str]:
    """The keys of a batch of an architecture.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class.
    """
    kind = _module_class(architecture)
    if has_two_towers(kind):
        return _tower_names(kind, architecture["config"])
    taken = inspect.signature(kind.forward).parameters
    if kind.main_input_name != "input_ids":
        return [name for name in (kind.main_input_name, "pixel_mask") if name in taken]
    types = (architecture["config"].get("type_vocab_size") or 0) > 1 and "token_type_ids" in taken
    return ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]


def _tower_names(kind: Any, config: Mapping[str, Any]) -> list[str]:
    """The keys of a batch of images and texts."""
    taken = inspect.signature(kind.forward).parameters
    types = (_text_config(config).get("type_vocab_size") or 0) > 1
    texts = [name for name in text_inputs(config["model_type"]) if name != "token_type_ids" or types]
    return [name for name in (*IMAGE_INPUTS, *texts) if name in taken]


def random_inputs(architecture: Mapping[str, Any], samples: int) -> Batch:
    """A random batch from a fixed seed, without padding.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class.
    """
    config = architecture["config"]
    names = input_names(architecture)
    generator = torch.Generator().manual_seed(0)
    made: Batch = {}
    if "pixel_values" in names or "input_ids" not in names:
        made |= _random_images(architecture, names, samples, generator)
    if "input_ids" in names:
        made |= _random_texts(_text_config(config), names, samples, generator)
    return made


def _random_texts(
    config: Mapping[str, Any], names: Sequence[str], samples: int, generator: torch.Generator
) -> dict[str, Tensor]:
    length = min(TOKENS, (config.get("max_position_embeddings") or TOKENS) // 2)
    shape = (samples, max(1, length))
    tokens = torch.randint(0, config["vocab_size"] - 1, shape, generator=generator)
    padding = config.get("pad_token_id")
    if padding is not None:  # shifts tokens from the padding token on by one, so that it does not occur
        tokens = tokens + (tokens >= padding)
    others = {"attention_mask": torch.ones, "token_type_ids": torch.zeros}
    made = {name: fill(shape, dtype=torch.int64) for name, fill in others.items() if name in names}
    return {"input_ids": tokens, **made}


def _random_images(
    architecture: Mapping[str, Any], names: Sequence[str], samples: int, generator: torch.Generator
) -> dict[str, Tensor]:
    size = _image_size(architecture)
    if "spatial_shapes" in names:
        return _random_patches(architecture["config"]["vision_config"], samples, generator)
    pixels = torch.randn(samples, size["channels"], size["height"], size["width"], generator=generator)
    mask = torch.ones(samples, size["height"], size["width"], dtype=torch.int64)
    return {"pixel_values": pixels} | ({"pixel_mask": mask} if "pixel_mask" in names else {})


def _random_patches(config: Mapping[str, Any], samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images as rows of patches, a square of them without padding (SigLIP 2)."""
    side = max(1, math.isqrt(config["num_patches"]))
    entries = config["num_channels"] * config["patch_size"] ** 2
    return {
        "pixel_values": torch.randn(samples, side**2, entries, generator=generator),
        "pixel_attention_mask": torch.ones(samples, side**2, dtype=torch.int64),
        "spatial_shapes": torch.full((samples, 2), side),
    }


def longest_text(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest text; None if the architecture has no limit."""
    positions = config.get("max_position_embeddings")
    if positions is None or config.get("model_type") not in FROM_PADDING:
        return positions
    padding = FROM_PADDING[config["model_type"]]
    if padding is None:
        padding = config.get("pad_token_id") or 0
    return int(positions) - padding - 1


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about texts: that of the text tower, or all of it."""
    return config.get("text_config") or config


def _longest_caption(config: Mapping[str, Any]) -> int | None:
    longest = longest_text(_text_config(config))
    return min(longest, PADDED_LENGTH) if longest and PADDED in config["model_type"] else longest


def _image_size(architecture: Mapping[str, Any]) -> dict[str, int]:
    config = architecture["config"]
    backbone = config.get("backbone_config") or config.get("vision_config") or {}
    size = architecture.get("input_size") or config.get("image_size") or backbone.get("image_size") or SIDE
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
