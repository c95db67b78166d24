"""Which faults may be gone at the next try: those of a network or a machine, never those of the input."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from mlorq.errors import StoreError, TransientError

RETRY_SECONDS = (1, 5, 15, 30)
LASTING = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG}

T = TypeVar("T")


def can_pass(error: BaseException | None) -> bool:
    """Whether trying again makes sense: a worker that was killed, a network that was down; not a full disk."""
    if isinstance(error, TransientError):
        return True
    fault = error.__cause__ if isinstance(error, StoreError) else error
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    return isinstance(fault, OSError) and not isinstance(fault, lasting) and fault.errno not in LASTING


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
