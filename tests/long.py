"""Parameters of which the default run takes a few, and the run of long tests the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], *kept: Any) -> list[Any]:
    """The values as parameters of a test; all but those in ``kept`` are marked long.

    Raises:
        AssertionError: a kept value is none of the values.
    """
    values = list(values)
    assert all(value in values for value in kept)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in values]
