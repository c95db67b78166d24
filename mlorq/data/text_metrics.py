"""Metrics of tagged words and of answers found in a text, as pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Entity = tuple[str, int, int]  # kind, index of the first word, index behind the last one


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sequence of tags ``B-kind``, ``I-kind`` and ``O``.

    An entity begins at ``B-``, and at an ``I-`` that does not follow a tag of its kind, as in the evaluation of CoNLL
    (Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 shared task, section 2).
    """
    found: set[Entity] = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        inside = mark in ("B", "I")
        if kind and not (mark == "I" and own == kind):
            found.add((kind, start, index))
            kind = ""
        if inside and not kind:
            kind, start = own, index
    return found


def entity_f1(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """F1 of the entities of all texts together: 2 · hits / (predicted + wanted); 0 if there are none.

    Args:
        predicted, wanted: tags of the words of each text.
    """
    hits = total = 0
    for ours, theirs in zip(map(entities, predicted), map(entities, wanted), strict=True):
        hits += len(ours & theirs)
        total += len(ours) + len(theirs)
    return 2 * hits / total if total else 0.0


def answer_words(text: str) -> list[str]:
    """The words of an answer: lower case, without punctuation and articles (as for SQuAD, arXiv 1606.05250, 6.1)."""
    return ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def answer_f1(found: str, answers: Sequence[str]) -> float:
    """F1 of the words of an answer, the largest over the right answers; no answer is right if there are none of them.

    Args:
        found: the answer; empty: none.
        answers: the right answers.
    """
    return max(_f1(answer_words(found), answer_words(answer)) for answer in answers or [""])


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def exact_match(found: str, answers: Sequence[str]) -> float:
    """1 if the words of an answer are those of a right one in their order, else 0; see ``answer_f1``."""
    return float(any(answer_words(found) == answer_words(answer) for answer in answers or [""]))
