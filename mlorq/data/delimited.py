"""Rows of CSV and TSV files, of any length."""

from __future__ import annotations

import csv
import io
import threading

from mlorq.data.contents import text_of
from mlorq.errors import DataError

_END = "\x03"  # a last row of one field; it is part of the row before if a quoted field has no end
_LIMIT = threading.Lock()  # csv's limit of a field's length is one for the whole process


def read_rows(data: bytes, origin: str, *, tabs: bool, quotes: bool) -> list[tuple[int, list[str]]]:
    """The rows of a file that are not blank, with their numbers, counted from 1.

    Args:
        data: content of the file, UTF-8 with or without a byte order mark.
        origin: name of the file, for errors.
        tabs: whether fields are separated by tabs instead of commas.
        quotes: whether quotation marks delimit fields; else they are part of the text.

    Raises:
        DataError: the file is not UTF-8, or a quoted field has no end.
    """
    text = text_of(data, origin)
    if text and not text.endswith("\n"):
        text += "\n"
    source = io.StringIO(f"{text}{_END}\n")
    reader = csv.reader(
        source, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    )
    try:
        with _LIMIT:
            before = csv.field_size_limit(max(csv.field_size_limit(), len(text) + len(_END) + 1))
            try:
                rows = [(number, row) for number, row in enumerate(reader, 1) if row]
            finally:
                csv.field_size_limit(before)
    except csv.Error as error:
        raise DataError(f"{origin} cannot be read: {error}") from error
    number, last = rows.pop()
    if last != [_END]:
        raise DataError(f"{origin}, row {number}: a quotation mark opens a field that has no end")
    return rows
