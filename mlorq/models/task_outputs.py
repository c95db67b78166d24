"""f(x) of tasks of transformers: logits, features of images, and a sketch of a language model's logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.base import attention_mask

POSITIONS = 16  # tokens of a text whose logits are compared
DIRECTIONS = 128  # numbers that stand for the logits of one token


def logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a classifier: logits, ``(samples, classes)``."""
    found: Tensor = module(**batch).logits
    return found


def image_features(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of an image encoder: one vector an image, ``(samples, width)``.

    The image tower's projected embedding of a model with two towers (CLIP, SigLIP), the pooled output, or else the mean
    over positions of the last hidden state.

    Raises:
        ModelError: the model returns none of these.
    """
    encode: Any = getattr(module, "get_image_features", module)
    output = encode(**batch)
    pooled = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if isinstance(pooled, Tensor):
        return pooled.flatten(1)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise ModelError(f"{type(module).__name__} returns no features of an image: use source custom")
    return hidden.mean(1) if hidden.dim() == 3 else hidden.flatten(2).mean(2)  # tokens, or maps with channels first


def sketched_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a language model: a sketch of its logits at evenly spaced tokens, ``(samples, positions × directions)``.

    All logits of a text would take gigabytes. Their projection on random directions of signs keeps squared distances
    in expectation (Achlioptas, Database-friendly random projections, 2003, theorem 1.1), so that its normalised error
    estimates theirs. The mean over the vocabulary, which no probability depends on, is taken off. Tokens of padding
    are none of the 16; texts of fewer tokens have some of them twice if there is padding.
    """
    ids, mask = batch["input_ids"], attention_mask(batch)
    if mask is None or mask.all():
        tokens = ids.shape[1]
        at = torch.linspace(0, tokens - 1, min(POSITIONS, tokens)).round().long().to(ids.device)
        return sketch(logits_at(module, batch, at))
    counted = mask.long().argsort(dim=1, descending=True, stable=True)  # places of the tokens, then of the padding
    places = counted.gather(1, even_places(mask))  # (samples, 16)
    at, column = places.unique(return_inverse=True)
    chosen = logits_at(module, batch, at)
    return sketch(chosen.gather(1, column[:, :, None].expand(-1, -1, chosen.shape[-1])))


def even_places(mask: Tensor) -> Tensor:
    """``POSITIONS`` evenly spaced numbers from 0 to one less than the entries of each row, ``(samples, POSITIONS)``.

    Args:
        mask: ``(samples, places)`` bool, whose true entries are counted.
    """
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    steps = torch.arange(POSITIONS, device=mask.device)
    return (2 * steps * last + POSITIONS - 1) // (2 * (POSITIONS - 1))  # rounded quotients, the same on every device


def takes_positions(module: nn.Module) -> bool:
    """Whether a language model computes logits at chosen positions alone."""
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def logits_at(module: nn.Module, batch: Mapping[str, Any], at: Tensor) -> Tensor:
    """Logits of a language model at some positions, ``(samples, positions, vocabulary)``.

    Args:
        module: the model.
        batch: its inputs.
        at: ``(positions,)`` int64, the same for all samples.
    """
    if takes_positions(module):  # the others are not computed
        chosen: Tensor = module(**batch, logits_to_keep=at).logits
    else:
        chosen = module(**batch).logits[:, at]
    return chosen


def sketch(chosen: Tensor) -> Tensor:
    """Logits less their mean, projected on ``DIRECTIONS`` random directions if there are more of them.

    Args:
        chosen: logits of some tokens, ``(samples, tokens, vocabulary)``.

    Returns:
        ``(samples, tokens × directions)``.
    """
    chosen = chosen - chosen.mean(-1, keepdim=True)
    if chosen.shape[-1] > DIRECTIONS:
        chosen = chosen @ directions(chosen.shape[-1]).to(chosen)
    return chosen.flatten(1)


@cache
def directions(size: int) -> Tensor:
    """Random signs over the root of their number, ``(size, DIRECTIONS)``; the same in every process."""
    signs = torch.randint(0, 2, (size, DIRECTIONS), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scaled: Tensor = (2 * signs - 1).float() / DIRECTIONS**0.5
    return scaled
