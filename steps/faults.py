"""Transient errors: those of a network or a machine, which a retry may not meet again; never those of the input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from mlorq.artifacts import transfer as files
from mlorq.errors import StoreError, TransientError

RETRY_SECONDS = (1, 5, 15, 30)

T = TypeVar("T")


def is_transient(error: BaseException | None) -> bool:
    """Whether a retry makes sense: yes for a killed worker or a lost connection, no for a full disk."""
    if isinstance(error, TransientError):
        return True
    return files.can_pass(error.__cause__ if isinstance(error, StoreError) else error)


def with_retries(call: Callable[[], T]) -> T:
    """``call()``, retried after transient errors, with the pauses ``RETRY_SECONDS``."""
    for seconds in RETRY_SECONDS:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            time.sleep(seconds)
    return call()
