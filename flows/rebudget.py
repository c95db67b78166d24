"""Flow ``rebudget``: further budgets for a searched model; only steps that depend on the budget are computed."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.naming import run_name
from flows.run_form import ConfigFile, RunForm


@flow(
    name="rebudget", flow_run_name=run_name, validate_parameters=False, persist_result=False, result_serializer="json"
)
def rebudget_flow(
    config: RunForm | ConfigFile, folder: str = "", budgets: list[str] | None = None, allocate_only: bool = False
) -> dict[str, Any]:
    """Compress a model to further budgets.

    Args:
        config: configuration of the run that searched the model, or the path of its file.
        folder: base of relative paths in the configuration; empty: the working directory.
        budgets: override the configuration's: "3bit", "12.5%", "25MB".
        allocate_only: solve the integer programs of the possible budgets only; requires that the store has the
            search.

    Returns:
        As ``compress_flow``. With ``allocate_only``, ``nmse``, ``metric`` and ``checkpoint`` are null, and ``errors``
        has ``{"budget": …, "error": …}`` for each impossible budget; if no budget is possible, the flow fails.
    """
    from flows.pipeline import carry_out

    given = {"config": config, "folder": folder, "budgets": budgets}
    return carry_out(given, allocate_only=allocate_only)
