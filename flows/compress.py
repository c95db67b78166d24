"""Flow ``compress``: a model, calibration data and budgets in, one compressed checkpoint a budget out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipeline import carry_out, run_name


@flow(name="compress", flow_run_name=run_name, persist_result=False, result_serializer="json")
def compress_flow(config: dict[str, Any], folder: str = "", budgets: list[str] | None = None) -> dict[str, Any]:
    """Compress a model: search, allocation, rounding, checkpoint and evaluation; what is in the store is reused.

    Args:
        config: the run's configuration, as in a YAML file.
        folder: that its relative paths start from.
        budgets: instead of the configuration's.

    Returns:
        ``{"results": [one public object a budget], "steps": {"computed", "reused"}, "wall_seconds"}``.
    """
    return carry_out(config, folder, budgets)
