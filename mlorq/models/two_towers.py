"""Models of an image tower and a text tower with one space of embeddings: CLIP, SigLIP, SigLIP 2.

A batch holds images and as many texts. f(x) is both towers' normalised embeddings side by side, so that the layers of
both are weighed alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.base import attention_mask
from mlorq.models.hub_names import load_problem
from mlorq.models.image_processor import ImageProcessor, load_processor

if TYPE_CHECKING:
    from mlorq.models.batches import Batch
    from mlorq.models.transformers import TransformersSettings

IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Trained on texts padded to this length, without a mask; transformers' pipeline pads for these names too.
PADDED, PADDED_LENGTH = "siglip", 64


@dataclass(frozen=True)
class TwoTowers:
    """Preparation of images and texts for a model of two towers.

    Attributes:
        images: the preparation of images.
        tokenize: the text inputs of a batch, from texts; longer ones are truncated at the model's length.
        tokenizer: what ``tokenize`` calls, with the interface of transformers.
    """

    images: ImageProcessor
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]]
    tokenizer: Any


def text_inputs(model_type: str) -> tuple[str, ...]:
    """Names of the text inputs that a type of models can have: SigLIP has no mask of padding."""
    return TEXT_INPUTS[:1] if PADDED in model_type else TEXT_INPUTS


def has_two_towers(kind: type) -> bool:
    """Whether a class of transformers encodes images and texts apart."""
    return hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")


def embeddings(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of two towers: the normalised embedding of each sample's image, then its text, ``(samples, 2 · width)``."""
    return torch.cat([image_embedding(module, batch), text_embedding(module, batch)], dim=1)


def image_embedding(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The normalised embeddings of the images of a batch, ``(samples, width)``.

    Raises:
        ModelError: the model has no image tower, or returns no pooled vector.
    """
    return _embedding(module, "get_image_features", batch, IMAGE_INPUTS)


def text_embedding(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The normalised embeddings of the texts of a batch, ``(samples, width)``; raises as ``image_embedding``."""
    return _embedding(module, "get_text_features", batch, TEXT_INPUTS)


def _embedding(module: nn.Module, method: str, batch: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    encode = getattr(module, method, None)
    if encode is None:
        raise ModelError(
            f"{type(module).__name__} has no {method}: task zero-shot-image-classification needs two towers"
        )
    output = encode(**{name: batch[name] for name in names if name in batch})
    pooled = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(pooled, Tensor) or pooled.dim() != 2:
        raise ModelError(f"{method} of {type(module).__name__} returns no vector per sample")
    return F.normalize(pooled.float(), dim=-1)


def two_towers(settings: TransformersSettings, location: str) -> TwoTowers:
    """Image processor and tokenizer of a model of two towers.

    Args:
        settings: settings of the model.
        location: its folder or hub name.

    Raises:
        ModelError: the model has no two towers, or its image processor or tokenizer cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel

    from mlorq.models.transformers_inputs import longest_text
    from mlorq.models.transformers_texts import load_tokenizer

    name = settings.name or location
    try:
        config = AutoConfig.from_pretrained(location)
        kind: Any = AutoModel._model_mapping.get(type(config), None)
        tokenizer = load_tokenizer(location, name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"model {name!r}: its tokenizer cannot be loaded: {load_problem(error, location)}") from error
    if not isinstance(kind, type) or not has_two_towers(kind):
        raise ModelError(f"model {name!r} is of type {config.model_type}, which has no towers of images and of texts")
    taken = inspect.signature(kind.get_text_features).parameters  # type: ignore[attr-defined]
    padded = PADDED in config.model_type
    read = [key for key in text_inputs(config.model_type) if key in taken]
    limits = [longest_text(config.text_config.to_dict()), PADDED_LENGTH if padded else None]
    longest = min([tokenizer.model_max_length, *(limit for limit in limits if limit)])

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(
            list(texts),
            padding="max_length" if padded else True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        return {key: found[key] for key in read if key in found}

    return TwoTowers(load_processor(location, name, IMAGE_INPUTS), tokenize, tokenizer)


def token_mask(module: nn.Module, batch: Batch) -> Tensor | None:
    """The token mask of a model of two towers: of patches that pad an image (SigLIP 2), or else of texts.

    A mask counts for the layers that read as many tokens as it has. Where a text is as long as an image, it would
    count for both towers, and is left out.
    """
    patches = batch.get("pixel_attention_mask")
    if isinstance(patches, Tensor):
        return patches.bool()
    mask = attention_mask(batch)
    patch = getattr(getattr(module.config, "vision_config", None), "patch_size", None)
    if mask is None or not isinstance(patch, int):
        return mask
    height, width = batch["pixel_values"].shape[-2:]
    count = (height // patch) * (width // patch)
    return None if mask.shape[1] in (count, count + 1) else mask  # with a class token or without
