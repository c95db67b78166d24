"""What Prefect shows of a run that fails: its name says what failed, and an error of the input is one line in its log.

The state of a failed run has the message of its error. Prefect logs a traceback as well, twice in runs of deployments:
it is left out for errors that name their cause (``MlorqError``) and stays for defects of the software.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlorq.errors import MlorqError, no_secrets, one_line

LOGGER = logging.getLogger(__name__)
LONGEST = 100  # characters of a message in the name of a run
REFUSED = "refused: "  # start of the name of a run whose parameters cannot be read
STEP = "in step "  # start of the note that an error of a step has


class _OneLine(logging.Filter):
    """Removes the tracebacks of ``MlorqError`` from the logs of runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, MlorqError):
            record.exc_info = record.exc_text = None
            return not str(record.msg).startswith("Engine execution exited")  # the second record of the same error
        return True


@contextmanager
def shown_failures() -> Iterator[None]:
    """The body of a flow: an error renames the flow run after what failed, and shows no secrets.

    The filter of the log stays: Prefect logs the error after the body.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(one, _OneLine) for one in logger.filters):
            logger.addFilter(_OneLine())
    try:
        with no_secrets():
            yield
    except Exception as error:
        _rename(error)
        raise


def add_step(error: BaseException, label: str) -> None:
    """Record the step in which an error was raised, for the name of the run and for tracebacks."""
    if not any(note.startswith(STEP) for note in getattr(error, "__notes__", ())):
        error.add_note(f"{STEP}{label}")


def failed_name(name: str, error: Exception) -> str:
    """Name of a failed run: that of the run with the step that failed, or with the start of the message.

    Args:
        name: of the run so far.
        error: that ended it.
    """
    steps = [note.removeprefix(STEP) for note in getattr(error, "__notes__", ()) if note.startswith(STEP)]
    what = f"{steps[0]} failed" if steps else shortened(error)
    return name if name.startswith(REFUSED) else f"{name}: {what}"


def refused_name(error: Exception) -> str:
    """Name of a run whose parameters cannot be read."""
    return f"{REFUSED}{shortened(error)}"


def shortened(error: Exception) -> str:
    """The start of an error's message."""
    text = one_line(error) if str(error) else type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1].rstrip()}…"


def _rename(error: Exception) -> None:
    """Rename the flow run; a failure here is only logged, since the error itself is raised."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_name(context.flow_run.id, failed_name(context.flow_run.name, error))
    except Exception as problem:
        LOGGER.debug("flow run not renamed: %r", problem)
