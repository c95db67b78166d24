"""f(x) and masks of models that recognise speech: with a decoder (Whisper), or with one output per frame (CTC)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import attention_mask
from mlorq.models.encoder_decoder import MASK, spread, target_logits
from mlorq.models.task_outputs import sketch
from mlorq.models.token_masks import TokenMask


def speech_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a recogniser: a sketch of its logits at evenly spaced places, ``(samples, outputs)``.

    The places are tokens of the transcript for a model with a decoder, which reads the transcript (teacher forcing),
    else frames of the recording. Data without transcripts has the decoder's start tokens alone: the search then hardly
    sees what a decoder does.
    """
    if "decoder_input_ids" in batch:
        return target_logits(module, batch)
    logits: Tensor = module(**batch).logits
    mask = frame_mask(module, batch)
    return sketch(spread(logits, mask if mask is not None and mask.shape == logits.shape[:2] else None))


def speech_masks(module: nn.Module, batch: Mapping[str, Any]) -> TokenMask:
    """Masks of the frames and of the transcript's tokens, those that the batch has."""
    return tuple(one for one in (frame_mask(module, batch), attention_mask(batch, MASK)) if one is not None)


def frame_mask(module: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Mask of the frames that are no padding, ``(samples, frames)``; None without an attention mask.

    Convolutions make frames of the amplitudes that the attention mask is for; the model knows their number.
    """
    mask = attention_mask(batch)
    frames: Any = getattr(module, "_get_feat_extract_output_lengths", None)
    if mask is None or frames is None:
        return mask
    # One by one: some models count the frames of a single recording only.
    counts = [int(frames(length.long())) for length in (*mask.sum(1).cpu(), torch.tensor(mask.shape[1]))]
    places = torch.arange(counts[-1], device=mask.device)
    found: Tensor = places < torch.tensor(counts[:-1], device=mask.device)[:, None]
    return found
