"""What Prefect shows of runs that fail."""

from __future__ import annotations

import io
import logging
import uuid
from pathlib import Path

import prefect
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.cli import main
from flows.failures import REFUSED, add_step, failed_name, refused_name, shown_failures
from mlorq.errors import BudgetError, ConfigError
from tests.flows.test_cli import write_project
from tests.flows.test_doctor import serving


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


@pytest.mark.parametrize("path", ["admin/version", "flows/", "flow_runs/"])
def test_a_server_that_is_overloaded_is_one_line(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = {"id": str(uuid.uuid4()), "name": "a flow", "created": None, "updated": None}
    answers = {"health": (200, True), "admin/version": (200, prefect.__version__), "flows/": (201, flow)}
    busy = answers | {path: (503, {"exception_message": "Service Unavailable"})}
    with serving({f"/api/{name}": answer for name, answer in busy.items()}) as place:
        settings = {PREFECT_API_URL: f"http://{place}/api", PREFECT_CLIENT_MAX_RETRIES: 0}
        with temporary_settings(settings):
            assert main(["compress", str(write_project(tmp_path))]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlorq: error")]
    assert len(error) == 1
    assert f"answered 503 to {'GET' if path == 'admin/version' else 'POST'} /api/{path}: " in error[0]
    assert "overloaded; run the same command again" in error[0]
