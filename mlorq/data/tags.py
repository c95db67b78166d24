"""Texts whose words have tags, as batches for models of task ``token-classification``; used by tables.

The words of a text are joined by spaces. The tag of a word is that of its first token; words behind ``max_length``
tokens, and words of which the tokenizer keeps nothing, do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.metrics import ENTITIES
from mlorq.data.source import Role, TextSettings
from mlorq.data.text_metrics import entity_f1
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.family import TextInputs

ACCURACY = "accuracy"
METRICS = (ENTITIES, ACCURACY)


@dataclass(frozen=True)
class TaggedText:
    """A text.

    Attributes:
        words: its words.
        tags: a class number of the model for each of them; None without tags.
    """

    words: list[str]
    tags: list[int] | None


def tagged_texts(
    words: Sequence[Any], tags: Sequence[Any] | None, names: Sequence[str], where: Callable[[int], str]
) -> list[TaggedText]:
    """The texts of a table.

    Args:
        words: cells with the words of a text: a list, or words with spaces between them.
        tags: cells with as many tags: names of classes, or numbers of them; None without tags.
        names: names of the model's classes.
        where: maps the index of a row to the text that locates it in errors.

    Raises:
        DataError: a cell is empty, has another number of tags than words, or a tag is no class of the model.
    """
    known = {name: number for number, name in enumerate(names)}
    found = []
    for index, cell in enumerate(words):
        own = _items(cell)
        if not own:
            raise DataError(f"{where(index)}: the text has no words")
        numbers = None
        if tags is not None:
            given = _items(tags[index])
            if len(given) != len(own):
                raise DataError(f"{where(index)}: {len(own)} words have {len(given)} tags")
            numbers = [_number(tag, known, where(index)) for tag in given]
        found.append(TaggedText(own, numbers))
    return found


def _items(cell: Any) -> list[str]:
    if isinstance(cell, str):
        return cell.split()
    return [str(item) for item in cell or ()]


def _number(tag: str, known: Mapping[str, int], where: str) -> int:
    if tag in known:
        return known[tag]
    if tag.isdecimal() and int(tag) < len(known):
        return int(tag)
    some = ", ".join(list(known)[:12])
    raise DataError(f"{where}: tag {tag!r} is no class of the model; it has {some}{' …' if len(known) > 12 else ''}")


def tag_dataset(
    texts: Sequence[TaggedText], settings: TextSettings, role: Role, inputs: TextInputs, origin: str
) -> Dataset:
    """A data set of tagged texts.

    Args:
        texts: the chosen texts; all or none have tags.
        settings: with the maximum length in tokens, the batch size and the metric.
        role: calibration or evaluation; the latter has the metric ``entity_f1`` if the model's classes are tags of
            entities (``B-kind``, ``I-kind``), and ``accuracy`` of the words.
        inputs: tokenizer and classes of the model.
        origin: the data set's name in errors.

    Raises:
        DataError: the tokenizer has no offsets, or the metric does not fit.
    """
    names = inputs.class_names()
    spans = any(name[:2] in ("B-", "I-") for name in names)
    metric = settings.metric or (ENTITIES if spans else ACCURACY)
    if metric not in METRICS or (metric == ENTITIES and not spans):
        fitting = METRICS if spans else (ACCURACY,)
        raise DataError(f"metric {metric!r} does not fit tags of these classes; choose {' or '.join(fitting)}")
    tokenizer = inputs.tokenizer()
    if not tokenizer.is_fast:
        raise DataError(f"{origin}: the model's tokenizer does not say which tokens belong to a word")
    encoded = tokenizer(
        [" ".join(text.words) for text in texts],
        truncation=True,
        max_length=min(settings.max_length, tokenizer.model_max_length),
        return_offsets_mapping=True,
    )
    offsets = encoded.pop("offset_mapping")
    order = sorted(range(len(texts)), key=lambda index: (len(offsets[index]), index))
    batches, places = [], []
    for start in range(0, len(order), settings.batch_size):
        part = order[start : start + settings.batch_size]
        rows = {name: [values[index] for index in part] for name, values in encoded.items()}
        batches.append(dict(tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")))
        places.append([first_tokens(texts[index].words, offsets[index]) for index in part])
    described: dict[str, Any] = {"batches": [digest_batch(batch) for batch in batches]}
    wanted = [texts[index].tags for index in order]
    known = [tags for tags in wanted if tags is not None]
    if role == "calibration" or len(known) < len(wanted):
        return Dataset(batches, len(order), digest_json(described))
    described |= {"metric": metric, "tags": known, "names": list(names), "places": places}
    evaluate = _Tags(batches, places, known, list(names), spans)
    return Dataset(batches, len(order), digest_json(described), metric, evaluate=evaluate)


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """``(word, token)`` of the first token of each word that has one.

    Args:
        words: the words that were joined by spaces.
        offsets: characters of each token, ``(first, behind the last)``; an empty range for special tokens.
    """
    owner = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
    found: dict[int, int] = {}
    for token, (start, stop) in enumerate(offsets):
        if stop > start:  # the last character, since some tokenizers count the space before a word to its first token
            found.setdefault(owner[stop - 1], token)
    return list(found.items())


@dataclass(frozen=True)
class _Tags:
    """Metrics of the tags of all words that have a token."""

    batches: Sequence[Mapping[str, Tensor]]
    places: Sequence[Sequence[Sequence[tuple[int, int]]]]
    tags: Sequence[Sequence[int]]
    names: Sequence[str]
    spans: bool

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        predicted: list[list[int]] = []
        places = [own for part in self.places for own in part]
        with torch.no_grad():
            for batch, part in zip(self.batches, self.places, strict=True):
                best = module(**move_batch(batch, floating.device, floating.dtype)).logits.argmax(-1).tolist()
                predicted += [[row[token] for _, token in own] for row, own in zip(best, part, strict=True)]
        wanted = [[tags[word] for word, _ in own] for tags, own in zip(self.tags, places, strict=True)]
        pairs = [
            pair for ours, theirs in zip(predicted, wanted, strict=True) for pair in zip(ours, theirs, strict=True)
        ]
        found = {ACCURACY: sum(ours == theirs for ours, theirs in pairs) / max(1, len(pairs))}
        if self.spans:
            found[ENTITIES] = entity_f1(self._names(predicted), self._names(wanted))
        return found

    def _names(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.names[number] for number in row] for row in rows]
