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


class Interrupt(threading.Event):
    """Set by the first signal that asks the process to end.

    Attributes:
        status: exit status after it: 128 and its number, as shells have it.
    """

    status = 128 + signal.SIGINT

    def caused(self, error: BaseException) -> bool:
        """Whether a signal led to an error, which hides what the signal raised."""
        if self.is_set():
            return True
        # In a flow, Prefect handles SIGTERM by an exception of its own, which it passes on when the flow has ended.
        terminated = getattr(sys.modules.get("prefect.exceptions"), "TerminationSignal", ())
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, terminated):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            self.status = 128 + signal.SIGTERM
        return cause is not None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The first Ctrl-C or SIGTERM raises KeyboardInterrupt; a second one, during the clean-up, ends at once.

    The store is always consistent, so ending at once loses no finished step. The first signal also sets the event that
    is returned, which running work polls: Python discards an exception that is raised in a finalizer or callback.
    """
    interrupted = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    # One that is ignored from the start, or handled by the caller, is left unchanged.
    unhandled = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    mine = {number: before for number, before in unhandled.items() if signal.getsignal(number) is before}

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            os._exit(interrupted.status)
        interrupted.status = 128 + number
        interrupted.set()
        raise KeyboardInterrupt

    for number in mine:
        signal.signal(number, handle)
    try:
        yield interrupted
    finally:
        for number, before in mine.items():
            signal.signal(number, before)
