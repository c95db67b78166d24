"""How much a command shows on standard error beside its result: ``--quiet``, ``--verbose`` and ``--log-level``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

LEVELS = ("debug", "info", "warning", "error", "critical")
LOGGERS = ("mlorq", "steps", "flows")


@dataclass(frozen=True)
class Verbosity:
    """What a command shows.

    Attributes:
        quiet: the result and errors, without progress, notes and warnings.
        verbose: Prefect's log of a run as well.
        level: least level of the log lines that are shown, Prefect's included; None: warnings, and what Prefect is
            configured to log if ``verbose``.
    """

    quiet: bool = False
    verbose: bool = False
    level: str | None = None

    @property
    def prefect_log(self) -> bool:
        """Whether Prefect's log of a run is shown."""
        return self.verbose or self.level is not None


_current: ContextVar[Verbosity | None] = ContextVar("verbosity", default=None)


def verbosity() -> Verbosity:
    """What the running command shows; the defaults outside a command."""
    return _current.get() or Verbosity()


def say(text: str) -> None:
    """Print a line on standard error, unless the command is quiet."""
    if not verbosity().quiet:
        complain(text)


def complain(text: str) -> None:
    """Print a line about an error on standard error."""
    print(f"mlorq: {text}", file=sys.stderr, flush=True)


@contextmanager
def showing(chosen: Verbosity) -> Iterator[None]:
    """Show what is chosen for the duration of a ``with`` block."""
    token = _current.set(chosen)
    try:
        with ExitStack() as stack:
            if chosen.quiet:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            if chosen.level is not None:
                stack.enter_context(_logging(chosen.level.upper()))
            yield
    finally:
        _current.reset(token)


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """Show log lines of a level and above; child processes inherit it for Prefect."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    root, variable = logging.getLogger(), "PREFECT_LOGGING_LEVEL"
    before = os.environ.get(variable)
    # Prefect reads it when it is imported. It then replaces the handler by its own.
    os.environ[variable] = level
    if not any(isinstance(known, logging.StreamHandler) for known in root.handlers):
        root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, own in zip(loggers, levels, strict=True):
            logger.setLevel(own)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
