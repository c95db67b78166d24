"""Flow ``compress``: a model, calibration data and budgets in, one compressed checkpoint per budget out.

Prefect imports a flow to deploy it, to run it, and once more before a cancelled run is Cancelled: torch is imported
only when the flow runs.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.naming import run_name
from flows.run_form import ConfigFile, RunForm


@flow(
    name="compress", flow_run_name=run_name, validate_parameters=False, persist_result=False, result_serializer="json"
)
def compress_flow(config: RunForm | ConfigFile, folder: str = "", budgets: list[str] | None = None) -> dict[str, Any]:
    """Compress a model: search, allocation, rounding, checkpoint and evaluation; artifacts in the store are reused.

    Args:
        config: model, data and settings; or the path of a configuration file.
        folder: base of relative paths in the configuration; empty: the working directory.
        budgets: override the configuration's: "3bit", "12.5%", "25MB".

    Returns:
        ``{"results": [one public object per budget], "steps": {"computed", "reused"}, "wall_seconds"}``.
    """
    from flows.pipeline import carry_out

    return carry_out({"config": config, "folder": folder, "budgets": budgets}, announce=True)
