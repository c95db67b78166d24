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
from mlorq.models.tasks import SPEECH, TARGETS, TASKS
from mlorq.models.text_outputs import CHOOSERS
from mlorq.models.transformers_modules import model_class
from mlorq.models.two_towers import IMAGE_INPUTS, PADDED, PADDED_LENGTH, TEXT_INPUTS, has_two_towers, text_inputs

TOKENS = 16  # length of a random text, and frames of a random recording
CHOICES_MADE = 3  # choices of a random sample
TARGET_TOKENS = 10  # length of a random target text
RECORDINGS = ("input_features", "input_values")
SPECTROGRAMS = "audio-spectrogram-transformer"
UNMASKED = ("whisper", SPECTROGRAMS)  # recordings are padded to one length, and all of it is heard
AMPLITUDES = (320,)  # per frame, where the configuration does not have the strides of convolutions
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
    if names[0] in RECORDINGS:
        return {"kind": "audio", "inputs": names}
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
    config, taken = architecture["config"], inspect.signature(kind.forward).parameters
    decoder = ["decoder_input_ids", "decoder_attention_mask"] if _reads_targets(architecture, kind) else []
    if kind.main_input_name in RECORDINGS:
        masked = "attention_mask" in taken and config["model_type"] not in UNMASKED
        # Features that are normalised over all of a recording's frames would count padding, masked or not.
        masked = masked and config.get("feat_extract_norm") != "group"
        return [kind.main_input_name, *(["attention_mask"] if masked else []), *decoder]
    if kind.main_input_name != "input_ids":
        return [name for name in (kind.main_input_name, "pixel_mask", "input_boxes") if name in taken]
    types = (config.get("type_vocab_size") or 0) > 1 and "token_type_ids" in taken
    return ["input_ids", "attention_mask", *(["token_type_ids"] if types else []), *decoder]


def _tower_names(kind: Any, config: Mapping[str, Any]) -> list[str]:
    """The keys of a batch of images and texts."""
    taken = inspect.signature(kind.forward).parameters
    types = (_text_config(config).get("type_vocab_size") or 0) > 1
    texts = [name for name in text_inputs(config["model_type"]) if name != "token_type_ids" or types]
    return [name for name in (*IMAGE_INPUTS, *texts) if name in taken]


def random_inputs(architecture: Mapping[str, Any], samples: int) -> Batch:
    """A random batch from a fixed seed, without padding; None for features of recordings of unknown sizes.

    Raises:
        CheckpointError: the installed version of transformers does not have the model class.
    """
    config = architecture["config"]
    names = input_names(architecture)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    if "pixel_values" in names:
        made |= _random_images(architecture, names, samples, generator)
    if "input_ids" in names:
        own = _text_config(config)
        chooses = _module_class(architecture).__name__.endswith(CHOOSERS)
        texts = samples * (CHOICES_MADE if chooses else 1)
        made |= _random_tokens(own, texts, own.get("max_position_embeddings"), TOKENS, generator)
        if "attention_mask" not in names:
            del made["attention_mask"]
        if chooses:
            made = {name: value.view(samples, CHOICES_MADE, -1) for name, value in made.items()}
        if "token_type_ids" in names:
            made["token_type_ids"] = torch.zeros_like(made["input_ids"])
    elif names[0] in RECORDINGS:
        shape = _recording_size(config, names[0])
        if shape is None:
            return None
        made = {names[0]: torch.randn(samples, *shape, generator=generator)}
        if "attention_mask" in names:
            made["attention_mask"] = torch.ones(samples, shape[0], dtype=torch.int64)
    if "decoder_input_ids" in names:
        # Of another length than the source texts: exporters take equal lengths for one.
        positions = config.get("max_target_positions") or config.get("max_position_embeddings")
        target = _random_tokens(config, samples, positions, TARGET_TOKENS, generator)
        made |= {f"decoder_{name}": value for name, value in target.items()}
    return made


def _random_images(
    architecture: Mapping[str, Any], names: Sequence[str], samples: int, generator: torch.Generator
) -> dict[str, Tensor]:
    size = _image_size(architecture)
    if "spatial_shapes" in names:
        return _random_patches(architecture["config"]["vision_config"], samples, generator)
    pixels = torch.randn(samples, size["channels"], size["height"], size["width"], generator=generator)
    mask = torch.ones(samples, size["height"], size["width"], dtype=torch.int64)
    made = {"pixel_values": pixels} | ({"pixel_mask": mask} if "pixel_mask" in names else {})
    if "input_boxes" in names:  # one per image: a corner in its first quarter, the other one in its last
        corners = torch.rand(samples, 1, 4, generator=generator) / 4 + torch.tensor([0.0, 0.0, 0.75, 0.75])
        made["input_boxes"] = corners * torch.tensor([size["width"], size["height"]] * 2)
    return made


def _random_tokens(
    config: Mapping[str, Any], samples: int, positions: int | None, most: int, generator: torch.Generator
) -> dict[str, Tensor]:
    shape = (samples, max(1, min(most, (positions or most) // 2)))
    tokens = torch.randint(0, config["vocab_size"] - 1, shape, generator=generator)
    padding = config.get("pad_token_id")
    if padding is not None:  # shifts tokens from the padding token on by one, so that it does not occur
        tokens = tokens + (tokens >= padding)
    return {"input_ids": tokens, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def _recording_size(config: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """The shape of a recording: of features (Whisper, AST), or of amplitudes for ``TOKENS`` frames or a few more."""
    if config["model_type"] == "whisper":
        return config["num_mel_bins"], 2 * config["max_source_positions"]
    if config["model_type"] == SPECTROGRAMS:
        return config["max_length"], config["num_mel_bins"]
    if name == "input_features":
        return None
    return ((TOKENS + 1) * math.prod(config.get("conv_stride") or AMPLITUDES),)


def _reads_targets(architecture: Mapping[str, Any], kind: Any) -> bool:
    """Whether a batch has inputs of the decoder: for models that generate texts, but not for classifiers."""
    import transformers

    if not architecture["config"].get("is_encoder_decoder"):
        return False
    if architecture["task"] is not None:
        return TASKS[architecture["task"]].inputs in ("targets", "speech")
    names = (TASKS[TARGETS].auto, TASKS[SPEECH].auto)
    generating = (getattr(transformers, name)._model_mapping.get(kind.config_class, None) for name in names)
    return any(kind in (found if isinstance(found, (tuple, list)) else (found,)) for found in generating)


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
    parts = (config, backbone, config.get("prompt_encoder_config") or {})
    named = (part["image_size"] for part in parts if part.get("image_size"))
    size = architecture.get("input_size") or next(named, SIDE)
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
    found = model_class(architecture["task"], kind)
    if found is None:
        raise CheckpointError(f"this version of transformers has no {architecture['task']} model of {kind.__name__}")
    return found
