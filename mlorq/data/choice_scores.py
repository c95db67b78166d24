"""Accuracy of language models that choose among texts by their log-likelihoods; used by tables with ``choices``.

``choice_accuracy`` is the share of rows whose right choice has the largest sum of log-probabilities of its tokens given
the context; ``choice_accuracy_norm`` divides the sum by the number of characters of the choice. These are ``acc`` and
``acc_norm`` of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), whose rules apply:

- Context and choice are tokenized as one text, with a space between them unless one of them has whitespace there, and
  without special tokens. Whitespace at the end of the context belongs to the choice.
- The context has as many tokens as it has alone; all tokens behind them are those of the choice.
- An empty context is the tokenizer's token of beginning, or else of end.
- A sequence that is too long loses tokens at its beginning.

Sequences that differ in the last token alone are read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.choices import ChoiceRow
from mlorq.data.language import LOGITS
from mlorq.data.metrics import CHOICE, CHOICE_NORM
from mlorq.data.source import TextSettings
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.family import TextInputs
from mlorq.models.task_outputs import logits_at, takes_positions

METRICS = (CHOICE, CHOICE_NORM)


@dataclass(frozen=True)
class _Scored:
    """A choice: indices of its row and in that, and its tokens."""

    row: int
    choice: int
    tokens: tuple[int, ...]


def choice_dataset(rows: Sequence[ChoiceRow], settings: TextSettings, inputs: TextInputs) -> Dataset:
    """Evaluation data of a language model: its batches are contexts with choices, padded on the right.

    Args:
        rows: the chosen rows.
        settings: with the maximum length in tokens, the batch size and the metric.
        inputs: the model's tokenizer.

    Raises:
        DataError: the metric does not fit, a choice is too long or has no tokens of its own, or a context is empty and
            the tokenizer has neither a token of beginning nor one of end.
    """
    metric = settings.metric or CHOICE
    if metric not in METRICS:
        raise DataError(f"metric {metric!r} does not fit choices; choose {' or '.join(METRICS)}")
    tokenizer = inputs.tokenizer()
    length = min(settings.max_length, tokenizer.model_max_length)
    read: dict[tuple[int, ...], list[_Scored]] = {}
    for scored, tokens in _requests(tokenizer, rows):
        if len(scored.tokens) > length:
            raise DataError(
                f"{rows[scored.row].where}: choice {scored.choice + 1} has {len(scored.tokens)} tokens: set max_length "
                "higher"
            )
        read.setdefault(tokens[-(length + 1) : -1], []).append(scored)
    order = sorted(read, key=len)
    batches, parts = [], []
    for start in range(0, len(order), settings.batch_size):
        part = order[start : start + settings.batch_size]
        ids = {"input_ids": [list(tokens) for tokens in part]}
        batches.append(dict(tokenizer.pad(ids, padding=True, padding_side="right", return_tensors="pt")))
        parts.append([read[tokens] for tokens in part])
    described: dict[str, Any] = {"batches": [digest_batch(batch) for batch in batches]}
    known = [row.right for row in rows]
    if None in known:
        return Dataset(batches, len(order), digest_json(described))
    described |= {
        "metric": metric,
        "choices": [[[[one.row, one.choice, one.tokens] for one in own] for own in part] for part in parts],
        "rows": [[row.right, [len(choice) for choice in row.choices]] for row in rows],
    }
    return Dataset(batches, len(order), digest_json(described), metric, evaluate=ChoiceAccuracy(batches, parts, rows))


def _requests(tokenizer: Any, rows: Sequence[ChoiceRow]) -> list[tuple[_Scored, tuple[int, ...]]]:
    """All choices, each with the tokens of its context and its own."""
    places, before, whole = [], [], []
    for index, row in enumerate(rows):
        for choice, (context, text) in enumerate(zip(row.contexts, row.choices, strict=True)):
            stripped = context.rstrip()
            between = context[len(stripped) :]
            if stripped and not row.joined and not between and not text[0].isspace():
                between = " "
            places.append((index, choice))
            before.append(stripped)
            whole.append(stripped + between + text)
    contexts = list(dict.fromkeys(before))
    number = {
        text: len(ids)
        for text, ids in zip(contexts, tokenizer(contexts, add_special_tokens=False)["input_ids"], strict=True)
    }
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found = []
    encoded = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for (place, choice), context, ids in zip(places, before, encoded, strict=True):
        own = number[context]
        if not own:
            if first is None:
                raise DataError(f"{rows[place].where}: the context is empty, and the tokenizer has no first token")
            ids, own = [first, *ids], 1
        if len(ids) <= own:
            raise DataError(f"{rows[place].where}: choice {choice + 1} has no tokens of its own")
        found.append((_Scored(place, choice, tuple(ids[own:])), tuple(ids)))
    return found


@dataclass(frozen=True)
class ChoiceAccuracy:
    """Both accuracies of a model.

    Attributes:
        batches: sequences without their last token, padded on the right.
        parts: for each sequence of each batch, the choices whose log-likelihoods it gives.
        rows: the rows, all with labels.
    """

    batches: Sequence[Mapping[str, Tensor]]
    parts: Sequence[Sequence[Sequence[_Scored]]]
    rows: Sequence[ChoiceRow]

    def __call__(self, module: nn.Module) -> dict[str, float]:
        hits = dict.fromkeys(METRICS, 0)
        for row, own in zip(self.rows, self.log_likelihoods(module), strict=True):
            hits[CHOICE] += int(own.argmax() == row.right)
            hits[CHOICE_NORM] += int((own / [len(choice) for choice in row.choices]).argmax() == row.right)
        return {name: value / len(self.rows) for name, value in hits.items()}

    def log_likelihoods(self, module: nn.Module) -> list[np.ndarray]:
        """``log p(choice | context)`` of all choices of each row, ``(choices,)`` float64."""
        sums = [np.zeros(len(row.choices)) for row in self.rows]
        vocabulary = 0
        with torch.no_grad():
            for batch, part in zip(self.batches, self.parts, strict=True):
                start = 0
                while start < len(part):
                    # As many sequences as have ``LOGITS`` logits together; one shows how many tokens there are.
                    kept = batch["input_ids"].shape[1]
                    if takes_positions(module):
                        kept = len(_positions(batch, part))
                    stop = start + max(1, LOGITS // (vocabulary * kept) if vocabulary else 1)
                    some = {name: value[start:stop] for name, value in batch.items()}
                    vocabulary = _add(module, some, part[start:stop], sums)
                    start = stop
        return sums


def _add(
    module: nn.Module, batch: Mapping[str, Tensor], part: Sequence[Sequence[_Scored]], sums: Sequence[np.ndarray]
) -> int:
    """Write the log-likelihoods of a batch into ``sums[row][choice]``, and return the size of the vocabulary."""
    floating = next(value for value in module.parameters() if value.is_floating_point())
    at = _positions(batch, part)
    logits = logits_at(module, move_batch(batch, floating.device, floating.dtype), at.to(floating.device))
    logs = logits.float().log_softmax(-1)  # (samples, positions, vocabulary)
    for own, length, scored in zip(logs, batch["attention_mask"].sum(1).tolist(), part, strict=True):
        for one in scored:
            end = length - int(at[0])
            tokens = torch.tensor(one.tokens, device=own.device)
            values = own[end - len(tokens) : end].gather(1, tokens[:, None])
            sums[one.row][one.choice] = float(values.double().sum())
    return logs.shape[-1]


def _positions(batch: Mapping[str, Tensor], part: Sequence[Sequence[_Scored]]) -> Tensor:
    """Positions of a batch whose logits are about a choice, and those between them."""
    lengths = batch["attention_mask"].sum(1).tolist()
    longest = (max(len(one.tokens) for one in scored) for scored in part)
    first = min(length - count for length, count in zip(lengths, longest, strict=True))
    return torch.arange(first, max(lengths))
