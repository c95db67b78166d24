"""Metrics of tagged words and of answers, against their definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mlorq.data.text_metrics import answer_f1, answer_words, entities, entity_f1, exact_match


def _entities_by_pairs(tags: list[str]) -> set[tuple[str, int, int]]:
    """Every span whose words belong together, and that can be extended on neither side."""

    def joined(index: int) -> bool:
        """Whether a word goes on with the entity of the word before it."""
        before = tags[index - 1] if index else "O"
        return tags[index][0] == "I" and before != "O" and before[2:] == tags[index][2:]

    found = set()
    for start in range(len(tags)):
        if tags[start] == "O" or joined(start):
            continue
        stop = start + 1
        while stop < len(tags) and joined(stop):
            stop += 1
        found.add((tags[start][2:], start, stop))
    return found


def test_entities_are_the_longest_spans_of_a_kind(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(200):
        tags = [str(tag) for tag in draw.choice(["O", "B-a", "I-a", "B-b", "I-b"], draw.integers(0, 9))]
        assert entities(tags) == _entities_by_pairs(tags)


def test_f1_of_entities_by_hand() -> None:
    wanted = [["B-per", "I-per", "O", "B-loc"], ["O", "B-org"]]
    assert entity_f1(wanted, wanted) == 1.0
    assert entity_f1([["B-per", "O", "O", "B-loc"], ["O", "O"]], wanted) == pytest.approx(2 * 1 / (2 + 3))
    assert entity_f1([["O"]], [["O"]]) == 0.0


def test_f1_of_answers_is_that_of_bags_of_words(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(100):
        ours, theirs = ([str(word) for word in draw.choice(list("uvwxy"), draw.integers(1, 6))] for _ in range(2))
        common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
        precision, recall = common / len(ours), common / len(theirs)
        wanted = 2 * precision * recall / (precision + recall) if common else 0.0
        assert answer_f1(" ".join(ours), ["z z z", " ".join(theirs)]) == pytest.approx(wanted)
        assert exact_match(" ".join(ours), [" ".join(theirs)]) == float(ours == theirs)
        assert Counter(answer_words(" ".join(ours))) == Counter(ours)


def test_articles_and_punctuation_do_not_count() -> None:
    assert answer_words("The  “Broncos”, an A.F.C. team!") == ["“broncos”", "afc", "team"]
    assert exact_match("the Denver Broncos.", ["Denver Broncos"]) == 1.0
    assert answer_f1("", []) == exact_match("", []) == 1.0
    assert answer_f1("something", []) == 0.0
