"""The process's own manners: nothing but results on standard output, and a Ctrl-C that is obeyed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send to standard error what anybody prints on standard output, be it Python, a solver in C or a child process."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed from the start
        kept = None
    try:
        if kept is not None:
            os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C raises KeyboardInterrupt as ever; a second one, while things are put in order, ends the process.

    The store is whole at any moment, so ending at once loses nothing that was finished. The event that is given is
    set by then, for work to look at: Python drops an exception that happens to be raised in a finalizer or callback.
    """
    interrupted = threading.Event()
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not mine or threading.current_thread() is not threading.main_thread():
        yield interrupted  # not ours to change: ignored from the start, or in other hands
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            os._exit(130)
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
