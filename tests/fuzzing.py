"""Fuzzing with hypothesis: profiles, damage of bytes, and changes of JSON and YAML values.

A fuzzer is a test with a parameter ``count`` (``counts``: a few in the default run, thousands in the long one), around
a function with ``given`` and ``fuzz(count)``. The default run draws the same examples every time; the long run draws
others and prints how to reproduce one that fails. No examples are kept in files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

FEW, LONG = "default", "long"
_COMMON: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}

settings.register_profile(FEW, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON)
settings.register_profile(LONG, print_blob=True, **_COMMON)


def counts(few: int, many: int) -> Any:
    """A parametrization of ``count``: ``few`` examples by default, ``many`` in the run of long tests."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.long)])


def fuzz(count: int) -> settings:
    """The settings of a fuzzer of ``count`` examples."""
    return settings(settings.get_profile(FEW if count < 500 else LONG), max_examples=count)


# -- bytes -------------------------------------------------------------------------------------------------------------

KINDS = ["bit", "byte", "fill", "remove", "double", "digit", "insert", "move", "cut", "empty"]
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF]


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Data with one to three changes: bits, bytes, numbers, pieces removed, doubled, moved or cut off; or nothing."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        # Headers are small and at the beginning, tables of contents at the end.
        near = draw(st.sampled_from([16, 256, len(data), len(data)]))
        at = draw(st.integers(0, max(0, min(near, len(found)) - 1)))
        at = len(found) - 1 - at if draw(st.booleans()) and found else at
        size = draw(st.sampled_from([1, 2, 4, 8, 40, 400]))
        kind = draw(
            st.sampled_from(["bit", "byte", "fill", "remove", "double", "digit", "insert", "move", "cut", "empty"])
        )
        if kind == "bit" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            found[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "fill":
            found[at : at + size] = bytes([draw(st.sampled_from(NUMBERS))]) * len(found[at : at + size])
        elif kind == "remove":
            del found[at : at + size]
        elif kind == "double":
            found[at:at] = found[at : at + size]
        elif kind == "digit":
            places = [index for index, byte in enumerate(found[:5000]) if 48 <= byte <= 57]
            if places:
                found[draw(st.sampled_from(places))] = 48 + draw(st.integers(0, 9))
        elif kind == "insert":
            found[at:at] = draw(st.binary(max_size=16))
        elif kind == "move":
            to = draw(st.integers(0, len(found)))
            found[to : to + size] = found[at : at + size]
        elif kind == "cut":
            del found[at:]
        elif kind == "empty" and draw(st.integers(0, 3)) == 0:
            found.clear()
    return bytes(found)


# -- values ------------------------------------------------------------------------------------------------------------


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, -(10**30), 10**400,
    0.0, -0.5, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "x", "0", "-1", "1e999", "null", "nan", "../..", "/dev/zero", "file:///dev/null", "memory://x",
    "nosuch://x/y", "a\0b", "a\nb", "é\u202e𝔘", "{}", "%s", "*", "[", "x" * 300, "x" * 20_000, "3bit", "3bit,2bit",
    [], {}, [[]], {"": ""}, {"a": {"b": 1}}, ["x", 1, None], [1, 2, 3], [{}], _deep(20), _deep(60),
]  # fmt: skip
KEYS = ["", "x", "model", "task", "source", "bits", "layers", "a.b", "<<", "é", "x" * 300, "0", "files", "bytes"]


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 4) -> Any:
    """A copy of JSON values with a few changes: entries removed, renamed, replaced, added, doubled or exchanged."""
    found = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(found, ()))
        parent, key = _at(found, draw(st.sampled_from(places)))
        kind = draw(st.sampled_from(["remove", "rename", "replace", "replace", "number", "add", "double", "exchange"]))
        if kind == "replace" or parent is found:
            parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif kind == "remove":
            del parent[key]
        elif kind == "number":
            parent[key] = draw(st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans()))
        elif kind == "exchange":
            other, place = _at(found, draw(st.sampled_from(places)))
            if other is not found:
                parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(parent[key])
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == "rename":
            parent[draw(st.sampled_from(KEYS) | st.text(max_size=6))] = parent.pop(key)
        elif kind == "double":
            parent[f"{key}2"] = copy.deepcopy(parent[key])
        else:
            parent[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return found[0]


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Paths of all entries below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """The mapping or list that holds an entry, and its key there."""
    for key in path[:-1]:
        value = value[key]
    return value, path[-1]


def one_line(error: Exception) -> None:
    """Check that the message of an error is one line that can be shown.

    Raises:
        AssertionError: it has line breaks, or is empty or long.
    """
    text = str(error)
    assert text.strip(), repr(error)
    assert "\n" not in text, text
    assert len(text) < 3000, text
