"""Flow ``rebudget``: further budgets for a model that was searched; only what depends on the budget is computed."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipeline import carry_out, run_name


@flow(name="rebudget", flow_run_name=run_name, persist_result=False, result_serializer="json")
def rebudget_flow(
    config: dict[str, Any], folder: str = "", budgets: list[str] | None = None, allocate_only: bool = False
) -> dict[str, Any]:
    """Compress a model to further budgets.

    Args:
        config: the run's configuration, as in a YAML file.
        folder: that its relative paths start from.
        budgets: instead of the configuration's.
        allocate_only: stop after the integer programs; the search must be in the store then.

    Returns:
        As ``compress_flow``; with ``allocate_only``, ``nmse``, ``metric`` and ``checkpoint`` are null.
    """
    return carry_out(config, folder, budgets, allocate_only=allocate_only)
