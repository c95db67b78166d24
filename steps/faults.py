"""Which faults may be gone at the next try: those of a network or a machine, never those of the input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from mlorq.artifacts import transfer as files
from mlorq.errors import StoreError, TransientError

RETRY_SECONDS = (1, 5, 15, 30)

T = TypeVar("T")


def can_pass(error: BaseException | None) -> bool:
    """Whether trying again makes sense: a worker that was killed, a network that was down; not a full disk."""
    if isinstance(error, TransientError):
        return True
    return files.can_pass(error.__cause__ if isinstance(error, StoreError) else error)


def patiently(call: Callable[[], T]) -> T:
    """``call()``, tried again where its fault can pass."""
    for seconds in RETRY_SECONDS:
        try:
            return call()
        except Exception as error:
            if not can_pass(error):
                raise
            time.sleep(seconds)
    return call()
