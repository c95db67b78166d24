"""f(x) of models that label the tokens of a text, or that find an answer in it; masks of texts with choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import attention_mask
from mlorq.models.encoder_decoder import spread
from mlorq.models.task_outputs import directions
from mlorq.models.token_masks import TokenMask

CHOOSERS = "ForMultipleChoice"  # end of the names of classes of transformers that read (samples, choices, tokens)


def token_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a tagger: logits at 16 evenly spaced tokens that are no padding, ``(samples, 16 · classes)``."""
    logits: Tensor = module(**batch).logits
    return spread(logits, attention_mask(batch)).flatten(1)


def span_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a model that finds answers: a sketch of the logits of their first and last token, ``(samples, outputs)``.

    Logits at padding are left out, and so is the mean, which no probability depends on. The rest is projected on random
    directions of signs, as in ``task_outputs.sketched_logits``, since texts have different numbers of tokens.
    """
    output = module(**batch)
    logits = torch.stack([output.start_logits, output.end_logits], dim=1)  # (samples, 2, tokens)
    mask = attention_mask(batch)
    counted = torch.ones_like(logits) if mask is None else mask.unsqueeze(1).expand_as(logits).to(logits.dtype)
    mean = (logits * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    centred = (logits - mean) * counted
    return (centred @ directions(logits.shape[-1]).to(centred)).flatten(1)


def choice_masks(module: nn.Module, batch: Mapping[str, Any]) -> TokenMask:
    """Masks of the tokens of a batch ``(samples, choices, tokens)``; ``module`` is not read.

    The model joins samples and choices to one axis. Statistics see the tokens of all choices as those of a sample,
    ``(samples, choices · tokens)``; blocks return ``(samples · choices, tokens, width)``.
    """
    mask = batch.get("attention_mask")
    return None if mask is None else (mask.flatten(1).bool(), mask.flatten(0, 1).bool())
