"""Source ``table``: texts in a CSV, TSV, Parquet or JSON lines table, tokenized for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import chosen_rows
from mlorq.data.metrics import CLASSIFICATION
from mlorq.data.model_inputs import text_inputs
from mlorq.data.source import (
    SOURCES,
    ChoiceSettings,
    DataSource,
    LabelSettings,
    ModelSettings,
    PathSettings,
    Role,
    TextSettings,
)
from mlorq.errors import DataError
from mlorq.models.family import TextInputs
from mlorq.models.tasks import tasks_of

if TYPE_CHECKING:
    from mlorq.data.base import Dataset


class TableSettings(ChoiceSettings, TextSettings, LabelSettings, PathSettings):
    """Keys of a table of texts."""


class TableSource(DataSource[TableSettings]):
    """Texts and labels in columns of a table."""

    name = "table"
    settings = TableSettings
    needed = ("path", "text")

    def locations(self, settings: TableSettings) -> Sequence[str | None]:
        """The table and the list of samples."""
        return settings.path, settings.list

    def load(self, settings: TableSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the texts as batches of tokens; see ``DataSource.load``."""
        from mlorq.data.columns import read_columns
        from mlorq.data.language import language_dataset
        from mlorq.data.targets import target_dataset
        from mlorq.data.texts import Rows, checked_labels, checked_texts, text_dataset

        inputs = text_inputs(model, folder, self.name)
        assert settings.path is not None
        assert settings.text is not None
        location = resolve_location(settings.path, folder)
        pairs = inputs.pairs
        if not pairs and len(settings.text) > 2:
            raise DataError(f"source table: {len(settings.text)} text columns; a classifier takes one or two")
        wanted = [*settings.text, *(settings.choices or ()), *([] if settings.label is None else [settings.label])]
        columns, numbers = read_columns(location, wanted)

        def where(column: int | str, index: int) -> str:
            return f"table {location}, row {numbers[index]}, column {column!r}"

        choosing = settings.choices is not None or inputs.predicts == "choices"
        if choosing or inputs.predicts in ("tags", "answers"):
            rows_of = _Columns(columns, numbers, f"table {location}", where)
            load = _choosing if choosing else _tagged if inputs.predicts == "tags" else _questions
            return load(rows_of, settings, role, inputs, chosen_rows(settings, numbers, rows_of.origin, folder, seed))
        texts = [checked_texts(columns[name], partial(where, name)) for name in settings.text]
        if inputs.predicts == "target":
            if settings.label is not None or len(texts) != 2:
                raise DataError(
                    f"source table: a model with task {tasks_of('targets')} takes two text columns, source and target, "
                    "and no label"
                )
            pairs_of = Rows(f"table {location}", texts, None, partial(where, settings.text[1]), numbers)
            return target_dataset(pairs_of, settings, role, inputs, folder, seed)
        if inputs.predicts is not None:
            if settings.label is not None or settings.list is not None or len(texts) > 1:
                raise DataError("source table: a language model takes one text column, and no label and no list")
            return language_dataset(texts[0], f"table {location}", settings, role, inputs, seed)
        metric = settings.metric or _usual_metric(settings, inputs)
        labels = None
        if settings.label is not None and (role == "evaluation" or not pairs):
            values, classes = columns[settings.label], metric in CLASSIFICATION
            labels = checked_labels(values, partial(where, settings.label), classes=classes)
        rows = Rows(f"table {location}", texts, labels, partial(where, settings.label or ""), numbers)
        return text_dataset(rows, settings, role, inputs, folder, seed, [metric])


class _Columns(NamedTuple):
    """Columns of a table, and where their cells are."""

    columns: Mapping[int | str, Sequence[Any]]
    numbers: Sequence[int]
    origin: str
    where: Callable[[int | str, int], str]


def _tagged(table: _Columns, settings: TableSettings, role: Role, inputs: TextInputs, picked: Sequence[int]) -> Dataset:
    """Words with tags."""
    from mlorq.data.tags import tag_dataset, tagged_texts

    if settings.text is None or len(settings.text) != 1:
        raise DataError("source table: a model that tags words takes one text column")
    words = [table.columns[settings.text[0]][index] for index in picked]
    column = settings.label if role == "evaluation" else None
    tags = None if column is None else [table.columns[column][index] for index in picked]
    named = settings.text[0] if column is None else column
    texts = tagged_texts(words, tags, inputs.class_names(), lambda index: table.where(named, picked[index]))
    return tag_dataset(texts, settings, role, inputs, table.origin)


def _questions(
    table: _Columns, settings: TableSettings, role: Role, inputs: TextInputs, picked: Sequence[int]
) -> Dataset:
    """Questions with the texts that hold their answers."""
    from mlorq.data.answers import Question, answer_dataset, answers_of
    from mlorq.data.texts import checked_texts

    if settings.text is None or len(settings.text) != 2:
        raise DataError("source table: a model that answers questions takes two text columns, question and text")
    columns = []
    for name in settings.text:
        cells = [table.columns[name][index] for index in picked]
        columns.append(checked_texts(cells, lambda index, name=name: table.where(name, picked[index])))  # type: ignore[misc]
    questions = []
    for question, text, index in zip(*columns, picked, strict=True):
        where = table.where(settings.text[0] if settings.label is None else settings.label, index)
        cell = None if settings.label is None else table.columns[settings.label][index]
        questions.append(Question(question, text, answers_of(cell, where), where))
    return answer_dataset(questions, settings, role, inputs, settings.label is not None)


def _choosing(
    table: _Columns, settings: TableSettings, role: Role, inputs: TextInputs, picked: Sequence[int]
) -> Dataset:
    """Contexts with choices, for models of multiple choice and for language models."""
    from mlorq.data.choice_scores import choice_dataset
    from mlorq.data.choices import choice_rows
    from mlorq.data.multiple_choice import multiple_choice_dataset

    if inputs.predicts not in ("choices", "next"):
        raise DataError("source table: choices is for tasks multiple-choice and text-generation; leave it out")
    if settings.choices is None:
        raise DataError("source table: a model with task multiple-choice needs choices, the columns of the choices")
    if inputs.predicts == "next" and role == "calibration":
        raise DataError("source table: a language model is calibrated on running text: choices is for its evaluation")
    rows = choice_rows(table.columns, settings, settings.label, picked, table.where)
    if inputs.predicts == "next":
        return choice_dataset(rows, settings, inputs)
    return multiple_choice_dataset(rows, settings, role, inputs)


def _usual_metric(settings: TableSettings, inputs: TextInputs) -> str:
    if inputs.pairs:
        return "spearman"
    if settings.label is None:
        return "accuracy"
    return "pearson" if len(inputs.class_names()) == 1 else "accuracy"


SOURCES.register(TableSource())
