"""Flow ``compress``: a model, calibration data and budgets in, one compressed checkpoint a budget out."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipeline import carry_out, run_name
from flows.run_form import ConfigFile, RunForm


@flow(
    name="compress", flow_run_name=run_name, validate_parameters=False, persist_result=False, result_serializer="json"
)
def compress_flow(config: RunForm | ConfigFile, folder: str = "", budgets: list[str] | None = None) -> dict[str, Any]:
    """Compress a model: search, allocation, rounding, checkpoint and evaluation; what is in the store is reused.

    Args:
        config: what to compress, on which data, and how; or the file that says so.
        folder: that relative paths of the configuration start from; empty: the working directory.
        budgets: instead of the configuration's: "3bit", "12.5%", "25MB".

    Returns:
        ``{"results": [one public object a budget], "steps": {"computed", "reused"}, "wall_seconds"}``.
    """
    return carry_out(config, folder, budgets, announce=True)
