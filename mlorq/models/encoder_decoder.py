"""Models with an encoder and a decoder: f(x) at the target's tokens, the decoder's inputs, and masks of both sequences.

The decoder reads the target text shifted by one token and predicts each of its tokens (teacher forcing). Texts of a
batch are padded on the right, so that the last tokens of a row may not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.base import attention_mask
from mlorq.models.task_outputs import even_places, sketch
from mlorq.models.token_masks import TokenMask

MASK = "decoder_attention_mask"
IGNORED = -100  # a label that does not count

Shift = Callable[[Tensor], Tensor]


def target_logits(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """f(x) of a model with encoder and decoder: a sketch of the logits of its target, ``(samples, outputs)``.

    Args:
        module: the model.
        batch: with ``decoder_input_ids``, and ``decoder_attention_mask`` if there is padding. The logits are those at
            16 evenly spaced tokens that the mask lets count.
    """
    logits: Tensor = module(**batch, use_cache=False).logits
    return sketch(spread(logits, attention_mask(batch, MASK)))


def sequence_masks(module: nn.Module, batch: Mapping[str, Any]) -> TokenMask:
    """Masks of the tokens of the input and of the target, those that the batch has; ``module`` is not read."""
    return tuple(one for one in (attention_mask(batch), attention_mask(batch, MASK)) if one is not None)


def spread(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values at 16 evenly spaced places of each sample, ``(samples, 16, width)``.

    Places repeat in samples with fewer than 16 of them: the result does not depend on the other samples of
    the batch.

    Args:
        values: ``(samples, places, width)``.
        mask: ``(samples, places)``, True at the first places of each sample, those that count; None: all count.
    """
    samples, places, width = values.shape
    if mask is None:
        mask = torch.ones(samples, places, dtype=torch.bool, device=values.device)
    return values.gather(1, even_places(mask).to(values.device)[:, :, None].expand(-1, -1, width))


def decoder_batch(labels: Sequence[Sequence[int]], shift: Shift, avoid: int = 0) -> dict[str, Tensor]:
    """The decoder's inputs, their mask, and the labels, each ``(samples, tokens)`` int64; ``IGNORED`` at padding.

    Args:
        labels: token numbers of the target texts, at least one for each.
        shift: result of ``shifter``.
        avoid: a number of tokens that the batch shall not have, that of the encoder's sequence: its mask could not be
            told from the decoder's. The batch gets one more place of padding instead.
    """
    length = max(map(len, labels))
    length += length == avoid
    padded = torch.tensor([[*row, *([IGNORED] * (length - len(row)))] for row in labels])
    return {"decoder_input_ids": shift(padded), MASK: (padded != IGNORED).long(), "labels": padded}


def without_values(kind: Any, config: Any) -> nn.Module:
    """A module of a class of transformers on the meta device, which answers what depends on its configuration alone."""
    with torch.device("meta"):
        module: nn.Module = kind._from_config(config)
    return module


def shifter(module: nn.Module) -> Shift:
    """A function that moves labels, ``(samples, tokens)``, to the right, with the decoder's first token before them.

    It is the method of the model if its class has one: mBART's decoder starts with the language of the text.

    Args:
        module: result of ``without_values``.

    Raises:
        ModelError: its configuration does not name the token that the decoder starts with, or the padding token.
    """
    own: Shift | None = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own
    config: Any = module.config
    start, padding = config.decoder_start_token_id, config.pad_token_id
    for name, value in (("decoder_start_token_id", start), ("pad_token_id", padding)):
        if value is None:
            raise ModelError(
                f"the configuration of {type(module).__name__} lacks {name}, which its decoder's inputs need"
            )

    def shifted(labels: Tensor) -> Tensor:
        moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return moved.masked_fill(moved == IGNORED, padding)

    return shifted
