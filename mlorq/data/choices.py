"""Rows with choices, one of them right: HellaSwag, PIQA, ARC, MMLU, WinoGrande, SWAG; used by tables.

The context of a row is its texts in the form of ``prompt``. With ``blank``, each choice takes the place of that mark in
the context, and what is judged is the text behind it (WinoGrande: Trinh and Le, arXiv 1806.02847, section 3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlorq.data.source import ChoiceSettings
from mlorq.data.texts import checked_texts
from mlorq.errors import DataError

Where = Callable[[int | str, int], str]  # column and index of a row, to the text that locates the cell in errors
FEWEST = 2  # choices of a row


@dataclass(frozen=True)
class ChoiceRow:
    """A row of a table.

    Attributes:
        contexts: the text before each choice; equal ones unless the choices fill a blank.
        choices: the texts of which one is right; equal ones if the choices fill a blank.
        right: index of the right one; None without labels.
        joined: whether choices follow their contexts as they are written, without a space between them.
        where: locates the row in errors.
    """

    contexts: list[str]
    choices: list[str]
    right: int | None
    joined: bool
    where: str


def choice_rows(
    columns: Mapping[int | str, Sequence[Any]],
    settings: ChoiceSettings,
    label: int | str | None,
    picked: Sequence[int],
    where: Where,
) -> list[ChoiceRow]:
    """The chosen rows of a table.

    Args:
        columns: the table's columns.
        settings: which of them are texts and choices, and the form of the context.
        label: column of the right choice; None: not read.
        picked: indices of the chosen rows.
        where: locates a cell in errors.

    Raises:
        DataError: a text or choice is missing, a row has fewer than two choices, its label names none of them, or its
            context has no blank.
    """
    assert settings.text is not None
    assert settings.choices is not None
    texts = []
    for name in settings.text:
        cells = [columns[name][index] for index in picked]
        texts.append(checked_texts(cells, lambda index, name=name: where(name, picked[index])))  # type: ignore[misc]
    found = []
    for parts, index in zip(zip(*texts, strict=True), picked, strict=True):
        place = where(settings.choices[0], index)
        choices, names = _choices([columns[name][index] for name in settings.choices], place)
        right = None
        if label is not None:
            place = where(label, index)
            right = _right(columns[label][index], choices, names, settings.first_choice, place)
        found.append(_row(_context(parts, settings.prompt), choices, right, settings.blank, place))
    return found


def _context(texts: Sequence[str], prompt: str | None) -> str:
    if prompt is None:
        return " ".join(texts)
    first, *others = prompt.split("{}")
    return first + "".join(text + behind for text, behind in zip(texts, others, strict=True))


def _row(context: str, choices: list[str], right: int | None, blank: str | None, where: str) -> ChoiceRow:
    if blank is None:
        return ChoiceRow([context] * len(choices), choices, right, False, where)
    before, mark, behind = context.partition(blank)
    if not mark or not behind.strip():
        raise DataError(f"{where}: the context has no blank {blank!r} with text behind it")
    return ChoiceRow([before + choice for choice in choices], [behind] * len(choices), right, True, where)


def _choices(cells: Sequence[Any], where: str) -> tuple[list[str], list[str]]:
    """The choices of a row and their names; empty cells at the end are left out."""
    names: Sequence[Any] = ()
    if len(cells) == 1:
        cell: Any = cells[0]
        if isinstance(cell, Mapping):  # ARC
            cell, names = cell.get("text"), cell.get("label") or ()
        if isinstance(cell, str):
            try:
                cell = json.loads(cell)
            except ValueError:
                cell = None
        if not isinstance(cell, Sequence):
            raise DataError(f"{where}: the choices are neither a list nor a mapping with the entry 'text'")
        cells = cell
    found = ["" if cell is None else str(cell) for cell in cells]
    while found and not found[-1].strip():
        found.pop()
    if len(found) < FEWEST:
        raise DataError(f"{where}: the row has {len(found)} choices; give at least {FEWEST}")
    for number, choice in enumerate(found, 1):
        if not choice.strip():
            raise DataError(f"{where}: choice {number} of {len(found)} is empty")
    return found, [str(name) for name in names]


def _right(cell: Any, choices: Sequence[str], names: Sequence[str], first: int, where: str) -> int:
    """Index of the right choice: by its name if the choices have names, by its number, or by its text."""
    text = str(cell).strip()
    if text in names:
        return names.index(text)
    if text.isdecimal() and not names:
        if 0 <= int(text) - first < len(choices):
            return int(text) - first
        raise DataError(f"{where}: label {text} is out of range: the {len(choices)} choices count from {first}")
    if choices.count(str(cell)) == 1:
        return choices.index(str(cell))
    raise DataError(f"{where}: label {text!r} is neither the number, nor the name, nor the text of a choice")
