"""Names of flow runs. Imported wherever a flow is, and therefore without torch (``flows.compress``)."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.runtime import flow_run

from flows.events import EXPECTED, requested
from flows.failures import refused_name
from flows.run_form import read_config
from mlorq.config.budget import parse_budgets
from mlorq.errors import MlorqError


def run_name() -> str:
    """Name of a flow run: the model and the budgets."""
    return name_of_run()


def name_of_run(default: Sequence[str] | None = None, about: str = "") -> str:
    """Name of a flow run.

    Args:
        default: budgets if the run has none; None: those of the configuration.
        about: what stands in the name in place of the budgets.
    """
    try:
        parameters = requested({**dict.fromkeys(EXPECTED), **flow_run.parameters})
        config = read_config(parameters["config"], parameters.get("folder") or "")
        asked = [config.budget] if isinstance(config.budget, str) else config.budget
        budgets = parse_budgets(parameters.get("budgets") or default or asked)
    except MlorqError as error:
        return refused_name(error)  # the flow then raises the error, and the run counts as failed
    return f"{config.model.display_name} {about or ' '.join(map(str, budgets))}"
