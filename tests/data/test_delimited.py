"""Rows of CSV and TSV files: long fields are read whole, and no row disappears in an open quotation."""

from __future__ import annotations

import csv

import pytest

from mlorq.data.delimited import read_rows
from mlorq.errors import DataError


@pytest.mark.parametrize("tabs", [False, True])
def test_fields_of_any_length(tabs):
    before = csv.field_size_limit()
    mark = "\t" if tabs else ","
    text = "good " * 40_000
    found = read_rows(f"text{mark}label\n{text}{mark}1\nbad{mark}0".encode(), "t", tabs=tabs, quotes=not tabs)
    assert found == [(1, ["text", "label"]), (2, [text, "1"]), (3, ["bad", "0"])]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"\xef\xbb\xbfa,b", [(1, ["a", "b"])]),
        (b'a\r\n\r\n"b ""c"" ,\nd",e\r\n', [(1, ["a"]), (3, ['b "c" ,\nd', "e"])]),
    ],
)
def test_rows_and_their_numbers(data, rows):
    assert read_rows(data, "t", tabs=False, quotes=True) == rows


@pytest.mark.parametrize("data", [b'a,1\n"b,2\nc,3\n', b'a,1\n"b,2\nc,3', b'a,1\nb,"2'])
def test_quotations_without_an_end_are_refused(data):
    with pytest.raises(DataError, match="table t, row 2: a quotation mark"):
        read_rows(data, "table t", tabs=False, quotes=True)
    assert len(read_rows(data, "table t", tabs=False, quotes=False)) == data.count(b"\n") + (not data.endswith(b"\n"))
