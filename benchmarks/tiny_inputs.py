"""Inputs of tiny models of transformers: random values of the shapes that the names of arguments stand for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

TOKENS, VOCABULARY, FIRST_WORD, IMAGE_SIZE = 8, 160, 20, 64
GRID = 4  # patches in either direction of an image whose patches are rows
GRIDS = ("grid_thw", "image_grid_thw", "target_sizes")
FLAT = ("hidden_states", "pixel_values")
STEPS = 5  # of a trajectory
ALTERNATIVES = 6  # shapes of an input at most


class Packed(nn.Module):
    """A model that reads the patches of all images one after another, with samples first in its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def needed(batch: dict[str, Tensor]) -> bool:
        """Whether the batch has images whose patches are rows."""
        return any(name in batch for name in GRIDS) and any(name in batch for name in FLAT)

    def forward(self, **batch: Tensor) -> Any:
        """What the model returns; patches come as ``(samples, patches, …)``."""
        return self.model(**{name: value.flatten(0, 1) if name in FLAT else value for name, value in batch.items()})


def place_images(batch: dict[str, Tensor], config: PreTrainedConfig, failed: str) -> bool:
    """Put as many image tokens into the texts as the message of a model asks for."""
    wanted = re.search(r"tokens: (\d+).*?features:? (\d+)", failed)
    token = attribute(config, "image_token_id", attribute(config, "image_token_index", None))
    if wanted is None or not isinstance(token, int) or "input_ids" not in batch or "pixel_values" not in batch:
        return False
    count = int(wanted[2]) // len(batch["input_ids"])
    words = batch["input_ids"][:, :TOKENS]
    if batch["input_ids"].shape[1] > TOKENS or not count:
        return False
    batch["input_ids"] = torch.cat([words, torch.full((len(words), count), token)], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == token).long()
    return True


def batches(model: nn.Module, config: PreTrainedConfig, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Batches that a model may take, those with most inputs first."""
    accepted = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    inputs = _inputs(config, torch.Generator().manual_seed(seed), set(accepted))
    offered = {name: values for name, values in inputs.items() if name in accepted}
    required = {
        name
        for name, one in accepted.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    without = {name: values for name, values in offered.items() if name != "attention_mask"}
    texts = {name: offered[name] for name in ("input_ids", "attention_mask") if name in offered}
    needed = {name: offered[name] for name in offered if name in required}
    choices = [offered, without, needed, {main: inputs[main]} if main in inputs else {}]
    choices += [texts | {name: offered[name]} for name in ("decoder_input_ids", "bbox") if name in offered]
    choices += [texts, *({name: values} for name, values in without.items())]
    seen = set()
    for index in range(ALTERNATIVES):
        for choice in choices:
            shapes = {name: min(index, len(values) - 1) for name, values in choice.items()}
            key = tuple(sorted(shapes.items()))
            if not choice or key in seen or not required <= set(choice):
                continue
            seen.add(key)
            yield {name: values[shapes[name]].clone() for name, values in choice.items()}


def _inputs(config: PreTrainedConfig, generator: torch.Generator, accepted: set[str]) -> dict[str, list[Tensor]]:
    """Values of inputs by name: several where shapes differ between models."""

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def ids(count: int) -> Tensor:
        last = max(FIRST_WORD + 1, min(VOCABULARY, number("vocab_size", VOCABULARY)))
        return torch.randint(FIRST_WORD, last, (2, count), generator=generator)

    def number(name: str, default: int) -> int:
        value = attribute(config, name, default)
        return value if isinstance(value, int) else default

    texts = ids(TOKENS)
    images, videos = _images(config, floats)
    inputs = {
        "input_ids": [texts],
        "attention_mask": [torch.ones_like(texts)],
        "pixel_values": images,
        "pixel_values_videos": videos,
        "decoder_input_ids": [ids(6)],
        "input_values": [floats(2, 4000), floats(2, 1, 4000), floats(2, number("max_length", 64), _mels(config))],
        "bbox": [torch.zeros(2, TOKENS, 4, dtype=torch.long)],
        "past_values": [floats(2, number("context_length", 32), 1)],
        "qformer_input_ids": [ids(TOKENS)],
        "query_embeds": [floats(2, 4, number("hidden_size", 32))],
        "visual_feats": [floats(2, 4, number("visual_feat_dim", 32))],
        "visual_pos": [floats(2, 4, number("visual_pos_dim", 4))],
        "inputs": [floats(2, TOKENS, number("d_model", 32)), texts],
        "latents": [floats(2, number("hidden_size", 32), TOKENS)],
        "action_embeds": [floats(2, 4, number("hidden_size", 32))],
        "lang_ids": [torch.zeros(2, dtype=torch.long)],
    }
    inputs |= _sounds(config, floats) | _series(config, floats) | _trajectories(config, floats)
    size = images[0].shape[-2:]
    inputs |= {"prompt_pixel_values": [images[0].flip(0)], "prompt_masks": [floats(2, 3, *size)]}
    if accepted & {*GRIDS, "spatial_shapes"}:
        inputs |= _patches(config, floats)
    if "query_embeds" in accepted:
        inputs["encoder_hidden_states"] = [floats(2, 4, number("encoder_hidden_size", 32))]
    if "pixel_values" in accepted:  # one kind of images is enough
        inputs.pop("pixel_values_videos")
    if "pixel_position_ids" in accepted:
        places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
        inputs |= {
            "pixel_values": _patches(config, floats)["pixel_values"],
            "pixel_position_ids": [places.repeat(2, 1, 1)],
        }
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = [torch.zeros_like(texts)]
    return inputs


def _images(config: PreTrainedConfig, floats: Any) -> tuple[list[Tensor], list[Tensor]]:
    size = attribute(config, "image_size", IMAGE_SIZE)
    if isinstance(size, dict):
        size = (size.get("height", IMAGE_SIZE), size.get("width", IMAGE_SIZE))
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    channels, frames = int(attribute(config, "num_channels", 3)), int(attribute(config, "num_frames", 2))
    video = floats(2, frames, channels, high, wide)
    images = [floats(2, channels, high, wide), floats(2, channels, 224, 224), video, floats(2, 1, channels, high, wide)]
    return images, [video]


def _mels(config: PreTrainedConfig) -> int:
    names = ("num_mel_bins", "feature_size", "num_mels", "input_dim", "feature_projection_input_dim", "input_feat_size")
    return next((value for name in names if isinstance(value := attribute(config, name, None), int)), 80)


def _sounds(config: PreTrainedConfig, floats: Any) -> dict[str, list[Tensor]]:
    mels = _mels(config)
    sources = 2 * int(attribute(config, "max_source_positions", 50))
    frames = 128
    features = [floats(2, mels, sources), floats(2, frames, mels), floats(2, 100, 160), floats(2, frames, 128)]
    features += [floats(2, 1, 1024, mels), floats(2, frames, 4 * mels)]
    masks = [
        torch.ones(2, sources, dtype=torch.long),
        *(torch.ones(2, one.shape[-2], dtype=torch.long) for one in features[1:]),
    ]
    return {
        "input_features": features,
        "input_features_mask": masks,
        "is_longer": [torch.zeros(2, 1, dtype=torch.bool)],
        "audio_mel": [features[1], features[3]],
        "audio_mel_mask": [torch.zeros(2, frames, dtype=torch.bool)],
    }


def _series(config: PreTrainedConfig, floats: Any) -> dict[str, list[Tensor]]:
    """Inputs of models that predict a series of numbers."""
    lags = attribute(config, "lags_sequence", None)
    if not lags:
        return {}
    future = int(attribute(config, "prediction_length", 4))
    past = int(attribute(config, "context_length", future) or future) + max(lags)
    known = int(attribute(config, "num_time_features", 0))
    return {
        "past_values": [floats(2, past)],
        "past_time_features": [floats(2, past, known)],
        "past_observed_mask": [torch.ones(2, past)],
        "future_values": [floats(2, future)],
        "future_time_features": [floats(2, future, known)],
    }


def _trajectories(config: PreTrainedConfig, floats: Any) -> dict[str, list[Tensor]]:
    if not hasattr(config, "act_dim"):
        return {}
    return {
        "states": [floats(2, STEPS, config.state_dim)],
        "actions": [floats(2, STEPS, config.act_dim)],
        "rewards": [floats(2, STEPS, 1)],
        "returns_to_go": [floats(2, STEPS, 1)],
        "timesteps": [torch.arange(STEPS).repeat(2, 1)],
        "attention_mask": [torch.ones(2, STEPS, dtype=torch.long)],
    }


def _patches(config: PreTrainedConfig, floats: Any) -> dict[str, list[Tensor]]:
    """Images whose patches are rows, ``(samples, patches, …)``, with their sizes in patches."""
    side = attribute(config, "patch_size", 16)
    side = int(side[0] if isinstance(side, (list, tuple)) else side)
    channels = int(
        attribute(config, "in_channels", attribute(config, "in_chans", attribute(config, "num_channels", 3)))
    )
    channels = channels if channels in (1, 3) else 3
    times, count = int(attribute(config, "temporal_patch_size", 1)), GRID * GRID
    rows = [floats(2, count, channels * times * side * side), floats(2, count, channels, side, side)]
    rows.append(floats(2, count, 2 * channels * side * side))  # pairs of frames, under another name
    grid = torch.tensor([[1, GRID, GRID]] * 2)
    return {
        "hidden_states": rows,
        "pixel_values": rows,
        "grid_thw": [grid],
        "image_grid_thw": [grid],
        "target_sizes": [grid[:, 1:]],
        "spatial_shapes": [grid[:, 1:]],
        "pixel_attention_mask": [torch.ones(2, count, dtype=torch.long)],
        "merge_sizes": [torch.ones(2, dtype=torch.long)],
    }


def attribute(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """An attribute of a configuration, or of the first one inside it that has it."""
    try:
        value = getattr(config, name, None)
    except Exception:  # an attribute that each layer has
        value = None
    if value is not None:
        return value
    inside = [child for child in vars(config).values() if isinstance(child, PreTrainedConfig)]
    return next((found for child in inside if (found := attribute(child, name, None)) is not None), default)
