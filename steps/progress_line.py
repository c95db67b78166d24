"""Progress of the Python API: one line that is replaced again and again, on a terminal or in a notebook."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from mlorq.numbers import duration

INTERVAL = 0.2  # seconds between two states of a running step
LABEL_WIDTH = 44


class ProgressLine:
    """Shows the running step: ``mlorq: round blocks.3.up 7/24  40%  1 min 5 s``.

    Args:
        show: replaces the text that was shown before.
        clock: gives the time in seconds.
    """

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show = show
        self._clock = clock
        self._started = clock()
        self._step = ("", 0, 1)
        self._shown = float("-inf")

    def started(self, label: str, done: int, total: int) -> None:
        """A step begins, the next after ``done`` of ``total`` of its kind."""
        self._step = (label, done, total)
        self._update(0.0)

    def advanced(self, done: int, total: int) -> None:
        """The running step has completed ``done`` of ``total`` units."""
        if self._clock() - self._shown >= INTERVAL:
            self._update(done / max(1, total))

    def close(self) -> None:
        """Remove the line."""
        self._show("")

    def _update(self, share: float) -> None:
        label, done, total = self._step
        self._shown = self._clock()
        took = duration(self._shown - self._started)
        self._show(f"mlorq: {label[:LABEL_WIDTH]} {done + 1}/{total}  {share:.0%}  {took}")


def watched_line() -> ProgressLine | None:
    """A line on the terminal or in the notebook that this process writes to; None in any other process."""
    stream: IO[str] | None = sys.stderr
    if stream is not None and stream.isatty():
        return ProgressLine(_on_terminal(stream))
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return None if shell is None or "IPKernelApp" not in shell.config else ProgressLine(_in_notebook())


def _on_terminal(stream: IO[str]) -> Callable[[str], None]:
    width = 0

    def show(text: str) -> None:
        nonlocal width
        text = text[: shutil.get_terminal_size().columns - 1]
        stream.write("\r" + text.ljust(width) + ("" if text else "\r"))  # spaces cover the rest of a longer line
        stream.flush()
        width = len(text)

    return show


def _in_notebook() -> Callable[[str], None]:
    # Not standard error: a notebook that is saved would hold every state of the line.
    from IPython import display as ipython

    display: Callable[..., Any] = ipython.display

    def content(text: str) -> dict[str, Any]:
        return {"text/plain": text}

    handle = display(content(""), raw=True, display_id=True)
    return lambda text: handle.update(content(text), raw=True)
