"""Questions with texts that hold their answers, as batches for models of task ``question-answering``; used by tables.

A text that is longer than ``max_length`` tokens with its question is cut into windows that overlap by a quarter. The
answer is the span of tokens with the largest sum of the logits of its first and its last token, in any window
(arXiv 1810.04805, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.metrics import ANSWER, EXACT
from mlorq.data.source import Role, TextSettings
from mlorq.data.text_metrics import answer_f1, exact_match
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.family import TextInputs

METRICS = (ANSWER, EXACT)
LONGEST = 30  # tokens of an answer


@dataclass(frozen=True)
class Question:
    """A row of a table.

    Attributes:
        question: the question.
        text: the text with the answer.
        answers: right answers; empty: the text has none.
        where: locates the row in errors.
    """

    question: str
    text: str
    answers: list[str]
    where: str


@dataclass(frozen=True)
class _Window:
    """The tokens of a question and of a part of its text.

    Attributes:
        row: index of the question.
        encoded: entries of a batch, one number a token.
        spans: characters of the text that each token has, ``(first, behind the last)``; None: none of the text.
    """

    row: int
    encoded: dict[str, list[int]]
    spans: list[tuple[int, int] | None]


def answers_of(cell: Any, where: str) -> list[str]:
    """The right answers in a cell: a text, a list of texts, or a mapping with the entry ``text`` (SQuAD).

    Raises:
        DataError: the cell has something else.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("text")
    if cell is None or cell == "":
        return []
    if isinstance(cell, str):
        return [cell]
    if isinstance(cell, Sequence) and all(isinstance(item, str) for item in cell):
        return list(cell)
    raise DataError(f"{where}: the answers are neither texts nor a mapping with the entry 'text'")


def answer_dataset(
    questions: Sequence[Question], settings: TextSettings, role: Role, inputs: TextInputs, labelled: bool
) -> Dataset:
    """A data set of questions with their texts.

    Args:
        questions: the chosen rows.
        settings: with the maximum length in tokens, the batch size and the metric.
        role: calibration, of which only the first window of each text is read, or evaluation, with the metrics
            ``answer_f1`` and ``exact_match``.
        inputs: the model's tokenizer.
        labelled: whether the questions have answers; without them there is no metric.

    Raises:
        DataError: a question leaves no place for the text, the tokenizer has no offsets, or the metric does not fit.
    """
    metric = settings.metric or ANSWER
    if metric not in METRICS:
        raise DataError(f"metric {metric!r} does not fit answers; choose {' or '.join(METRICS)}")
    tokenizer = inputs.tokenizer()
    if not tokenizer.is_fast:
        raise DataError("the model's tokenizer does not say which characters a token has; question-answering needs it")
    length = min(settings.max_length, tokenizer.model_max_length)
    windows: list[_Window] = []
    for row, question in enumerate(questions):
        own = _windows(tokenizer, question, row, length)
        windows += own[:1] if role == "calibration" else own
    windows.sort(key=lambda window: (len(window.spans), window.row))
    parts = [windows[start : start + settings.batch_size] for start in range(0, len(windows), settings.batch_size)]
    batches = []
    for part in parts:
        rows = {name: [window.encoded[name] for window in part] for name in part[0].encoded}
        batches.append(dict(tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")))
    described: dict[str, Any] = {"batches": [digest_batch(batch) for batch in batches]}
    if role == "calibration" or not labelled:
        return Dataset(batches, len(windows), digest_json(described))
    described |= {"metric": metric, "answers": [[one.text, one.answers] for one in questions]}
    evaluate = _Answers(batches, parts, questions)
    return Dataset(batches, len(windows), digest_json(described), metric, evaluate=evaluate)


def _windows(tokenizer: Any, question: Question, row: int, length: int) -> list[_Window]:
    try:
        found = tokenizer(
            question.question,
            question.text,
            truncation="only_second",
            max_length=length,
            stride=length // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    except BaseException as error:  # the tokenizer panics, which is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise DataError(
            f"{question.where}: the question leaves no place for its text in {length} tokens: set max_length higher"
        ) from None
    names = [name for name in tokenizer.model_input_names if name in found]
    windows = []
    for number, offsets in enumerate(found["offset_mapping"]):
        members = found.sequence_ids(number)
        spans = [tuple(span) if member == 1 else None for span, member in zip(offsets, members, strict=True)]
        windows.append(_Window(row, {name: list(found[name][number]) for name in names}, spans))
    return windows


@dataclass(frozen=True)
class _Answers:
    """Metrics of the answers to all questions, means over them."""

    batches: Sequence[Mapping[str, Tensor]]
    parts: Sequence[Sequence[_Window]]
    questions: Sequence[Question]

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())
        best: dict[int, tuple[float, str]] = {}
        none: dict[int, float] = {}
        with torch.no_grad():
            for batch, part in zip(self.batches, self.parts, strict=True):
                output = module(**move_batch(batch, floating.device, floating.dtype))
                starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
                for window, start, end in zip(part, starts, ends, strict=True):
                    found = best_span(start, end, window.spans)
                    if found is not None and (window.row not in best or found[0] > best[window.row][0]):
                        best[window.row] = found[0], self.questions[window.row].text[found[1] : found[2]]
                    without = float(start[0] + end[0])  # both at the first token: the text has no answer
                    none[window.row] = min(none.get(window.row, without), without)
        may_lack = any(not question.answers for question in self.questions)
        scores: dict[str, Callable[[str, Sequence[str]], float]] = {ANSWER: answer_f1, EXACT: exact_match}
        total = dict.fromkeys(scores, 0.0)
        for row, question in enumerate(self.questions):
            score, text = best.get(row, (float("-inf"), ""))
            answer = "" if may_lack and none[row] > score else text
            for name, function in scores.items():
                total[name] += function(answer, question.answers)
        return {name: value / len(self.questions) for name, value in total.items()}


def best_span(start: Tensor, end: Tensor, spans: Sequence[tuple[int, int] | None]) -> tuple[float, int, int] | None:
    """Score and characters of the best answer in a window; None if it has nothing of the text.

    Args:
        start, end: logits of the first and last token of the answer, ``(tokens,)``, padded or not.
        spans: characters of each token, None for tokens that are not of the text; at most ``LONGEST`` tokens in a row
            are an answer.
    """
    places = [index for index, span in enumerate(spans) if span is not None]
    if not places:
        return None
    first, last = places[0], places[-1] + 1
    scores = start[first:last, None] + end[None, first:last]
    ones = torch.ones_like(scores)
    scores = scores.masked_fill((ones.triu() - ones.triu(LONGEST)) == 0, float("-inf"))
    at = int(scores.argmax())
    left, right = spans[first + at // len(scores)], spans[first + at % len(scores)]
    assert left is not None and right is not None  # noqa: PT018 - the text's tokens follow one another
    return float(scores.max()), left[0], right[1]
