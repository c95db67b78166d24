"""Batches of running text for language models, with their perplexity; used by tables and files of text.

Texts are tokenized, joined with the tokenizer's end token between them, and cut into pieces of equal length, so that no
batch has padding. A model of masked tokens reads pieces in which 15 % of the tokens are masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.choose import seeded_choice
from mlorq.data.metrics import PERPLEXITY
from mlorq.data.source import LanguageSettings, Role, TextSettings, TokenSettings
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.family import TextInputs

MASKED = 0.15  # share of masked tokens (Devlin et al., arXiv 1810.04805, section 3.1)
LOGITS = 2**26  # numbers of a forward pass of the metric: 256 MB in float32


def language_dataset(
    texts: Sequence[str],
    origin: str,
    settings: TextSettings | LanguageSettings,
    role: Role,
    inputs: TextInputs,
    seed: int,
) -> Dataset:
    """A data set of pieces of text.

    Args:
        texts: the texts, in order.
        origin: the data set's name in errors.
        settings: number of pieces, tokens in one, and batch size.
        role: calibration or evaluation; the latter has the metric ``perplexity``.
        inputs: the tokenizer, and which tokens the model predicts.
        seed: of the choice of pieces and masked tokens.

    Raises:
        DataError: the text is too short, or the metric is another one.
    """
    if settings.metric not in (None, PERPLEXITY):
        raise DataError(f"metric {settings.metric!r} does not fit a language model; choose {PERPLEXITY}")
    tokenizer = inputs.tokenizer()
    pieces = _pieces(tokenizer, texts, origin, settings, masked=inputs.predicts == "masked")
    picked = seeded_choice(len(pieces), settings.samples, seed, origin, f" of {pieces.shape[1]} tokens")
    pieces = pieces[list(picked)]
    labels, read = pieces, pieces
    if inputs.predicts == "masked":
        if tokenizer.mask_token_id is None:
            raise DataError(f"{origin}: the model's tokenizer has no mask token, which task fill-mask needs")
        hidden = _masked(pieces, set(tokenizer.all_special_ids), seed)
        read = torch.where(hidden, tokenizer.mask_token_id, pieces)
        labels = torch.where(hidden, pieces, -100)
    parts = list(zip(read.split(settings.batch_size), labels.split(settings.batch_size), strict=True))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids, _ in parts]
    described: dict[str, Any] = {"batches": [digest_batch(batch) for batch in batches]}
    if role == "calibration":
        return Dataset(batches, len(pieces), digest_json(described))
    described |= {"metric": PERPLEXITY, "labels": [digest_batch(part) for _, part in parts]}
    evaluate = Perplexity(batches, [part for _, part in parts], inputs.predicts == "next")
    return Dataset(batches, len(pieces), digest_json(described), PERPLEXITY, evaluate=evaluate)


def _pieces(tokenizer: Any, texts: Sequence[str], origin: str, settings: TokenSettings, *, masked: bool) -> Tensor:
    """Token numbers of all whole pieces, ``(pieces, tokens)``."""
    rows: Sequence[Sequence[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream = [token for row in rows if row for token in (*row, *(() if end is None else (end,)))]
    around: list[list[int]] = [[], []]
    if masked:
        marks = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        around = [[] if mark is None else [mark] for mark in marks]
    length = min(settings.max_length, tokenizer.model_max_length) - len(around[0]) - len(around[1])
    count = len(stream) // length
    if not count:
        raise DataError(f"{origin} has {len(stream)} tokens, fewer than one piece of {length}: set max_length lower")
    pieces = torch.tensor(stream[: count * length]).view(count, length)
    first, last = (torch.tensor(mark, dtype=torch.int64).expand(count, -1) for mark in around)
    return torch.cat([first, pieces, last], dim=1)


def _masked(pieces: Tensor, special: set[int], seed: int) -> Tensor:
    """Where tokens are masked: a seeded choice of ``MASKED`` of the tokens of each piece, at least one."""
    ordinary = ~torch.isin(pieces, torch.tensor(sorted(special)))
    random = torch.from_numpy(np.random.default_rng(seed).random(tuple(pieces.shape))).where(ordinary, 2.0)
    count = (ordinary.sum(1) * MASKED).ceil().long().clamp(max=ordinary.sum(1))
    rank = random.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < count[:, None]


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of the predicted tokens, in all texts.

    Attributes:
        batches: the model's inputs; all tensors have the samples first.
        labels: token numbers ``(samples, tokens)`` of each batch, -100 where no token is predicted.
        following: whether each token is predicted from those before it in ``labels``; else at its own place.
    """

    batches: Sequence[Mapping[str, Tensor]]
    labels: Sequence[Tensor]
    following: bool

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        total, count, size = 0.0, 0, 1
        with torch.no_grad():
            for batch, labels in zip(self.batches, self.labels, strict=True):
                start = 0
                while start < len(labels):
                    rows = slice(start, start + size)
                    part = {name: value[rows] for name, value in batch.items()}
                    logits = module(**move_batch(part, floating.device, floating.dtype)).logits
                    wanted = labels[rows].to(logits.device)
                    if self.following:
                        logits, wanted = logits[:, :-1], wanted[:, 1:]
                    losses = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")
                    total += float(losses)
                    count += int((wanted != -100).sum())
                    start += size
                    size = max(1, LOGITS // max(1, logits[0].numel()))
        return {PERPLEXITY: math.exp(min(total / count, 700.0))}
