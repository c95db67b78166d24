"""Standard output reserved for results, and a reliable Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType

from flows.verbosity import verbosity


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect standard output to standard error, for Python, solvers in C and child processes alike.

    A quiet command discards what they print.
    """
    sys.stdout.flush()
    with ExitStack() as stack:
        other, descriptor = sys.stderr, 2
        if verbosity().quiet:
            other = stack.enter_context(open(os.devnull, "w"))
            descriptor = other.fileno()
        try:
            kept = os.dup(1)
        except OSError:  # closed from the start
            kept = None
        try:
            if kept is not None:
                os.dup2(descriptor, 1)
            with redirect_stdout(other):
                yield
        finally:
            if kept is not None:
                os.dup2(kept, 1)
                os.close(kept)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C raises KeyboardInterrupt as usual; a second one, during the clean-up, ends the process at once.

    The store is always consistent, so ending at once loses no finished step. The first Ctrl-C also sets the event that
    is returned, which running work polls: Python discards an exception that is raised in a finalizer or callback.
    """
    interrupted = threading.Event()
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not mine or threading.current_thread() is not threading.main_thread():
        yield interrupted  # ignored from the start, or handled by the caller: left unchanged
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
