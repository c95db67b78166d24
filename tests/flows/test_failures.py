"""What Prefect shows of runs that fail."""

from __future__ import annotations

import io
import logging

import pytest

from flows.failures import REFUSED, add_step, failed_name, refused_name, shown_failures
from mlorq.errors import BudgetError, ConfigError


def logged(error: Exception) -> str:
    """What a flow run's log has of an error, as Prefect logs it."""
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("prefect.flow_runs")
    before, handler.level = logger.level, logging.DEBUG
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with shown_failures():
            raise error
    except Exception as raised:
        logger.error("Encountered exception during execution: %r", raised, exc_info=True)
        logger.error("Engine execution exited with unexpected exception", exc_info=True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return stream.getvalue()


def test_an_error_of_the_input_is_one_line() -> None:
    message = "budget 0.1bit leaves 28 B"
    assert logged(BudgetError(message)).splitlines() == [
        f"Encountered exception during execution: BudgetError({message!r})"
    ]


def test_a_defect_keeps_its_traceback() -> None:
    assert logged(KeyError("rows")).count("Traceback (most recent call last)") == 2


def test_names_of_failed_runs() -> None:
    assert failed_name("net 0.1bit", BudgetError("budget 0.1bit leaves 28 B")) == (
        "net 0.1bit: budget 0.1bit leaves 28 B"
    )
    error = KeyError("rows")
    add_step(error, "round blocks.0.up")
    add_step(error, "compare")  # only the innermost counts
    assert failed_name("net 4bit", error) == "net 4bit: round blocks.0.up failed"
    refused = refused_name(ConfigError("unknown key 'budgte'; did you mean 'budget'?"))
    assert refused == f"{REFUSED}unknown key 'budgte'; did you mean 'budget'?"
    assert failed_name(refused, ConfigError("unknown key 'budgte'")) == refused
    assert len(refused_name(ConfigError("x" * 500))) < 120


@pytest.mark.parametrize("error", [BudgetError(""), KeyError()])
def test_an_error_without_a_message(error: Exception) -> None:
    assert failed_name("net", error) == f"net: {type(error).__name__}"
