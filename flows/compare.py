"""Flow ``compare``: several methods on one model at the same size, in one table."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import flow, tags
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.comparison import activation_width, notes, plan, row
from flows.comparison_methods import chosen
from flows.events import requested
from flows.failures import REFUSED, shown_failures
from flows.naming import name_of_run
from flows.pipeline import run_on, show
from flows.progress import format_seconds, terminal_progress
from flows.run import handed, handing, prepare
from flows.run_form import ConfigFile, RunForm, explicit_values
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.budget import Budget, parse_budgets, shown_budget
from mlorq.config.run import RunConfig
from mlorq.errors import MlorqError
from mlorq.evaluation.page import render_table
from steps.session import Session

ARTIFACT = "compare"  # its step name in the store
TABLE, PAGE, ROWS = "compare.parquet", "compare.html", "compare.json"
NOT_ON_PAGE = ("model", "method", "weights", "checkpoint", "file_bytes", "asked_bytes")


def compare_name() -> str:
    """Name of a flow run: the model and the budgets."""
    name = name_of_run()
    return name if name.startswith(REFUSED) else f"compare {name}"


def method_name() -> str:
    """Name of a method's flow run: the model, the budget and the method."""
    parameters = flow_run.parameters
    return f"{parameters['model']} {shown_budget(parameters['budget']['text'])} {parameters['method']}"


@flow(name="compare-method", flow_run_name=method_name, validate_parameters=False, persist_result=False)
def method_flow(model: str, method: str, config: dict[str, Any], folder: str, budget: dict[str, str]) -> dict[str, Any]:
    """One method's run; artifacts in the store are reused.

    Args:
        model: its short name, for display.
        method: its name, for display.
        config: its complete configuration.
        folder: that relative paths start from.
        budget: of the run (``Budget.to_json``).

    Returns:
        As ``compress_flow``.
    """
    started = time.perf_counter()
    given = handed()
    with shown_failures():
        budgets = [Budget.from_json(budget)]
        session = given.session if given else prepare(RunConfig.from_mapping(config, folder), budgets)
        return run_on(session, budgets, started)


@flow(name="compare", flow_run_name=compare_name, validate_parameters=False, persist_result=False)
def compare_flow(
    config: RunForm | ConfigFile,
    folder: str = "",
    budgets: list[str] | None = None,
    methods: list[str] | None = None,
    activations: int | None = None,
) -> dict[str, Any]:
    """Compress a model with several methods at the same size.

    Args:
        config: model, data, and the settings that all methods share; or the path of a configuration file.
        folder: base of relative paths in the configuration; empty: the working directory.
        budgets: override the configuration's: "3bit", "12.5%", "25MB".
        methods: names; `mlorq compare --help` lists them and the default.
        activations: their bit-width; none: that of the configuration.

    Returns:
        ``{"rows": [one per budget and method], "results": [as compress_flow], "files": {"table", "page", "rows"},
        "steps", "wall_seconds"}``.
    """
    given = {"config": config, "folder": folder, "budgets": budgets, "methods": methods, "activations": activations}
    return carry_out(given)


@shown_failures()
def carry_out(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The body of ``compare_flow``."""
    started = time.perf_counter()
    parameters = requested(parameters)
    budgets = parameters["budgets"]
    values, folder = explicit_values(parameters["config"], parameters["folder"] or "")
    wanted, width = chosen(parameters["methods"]), activation_width(values, parameters["activations"])
    given = handed()
    base = given.session if given else prepare(RunConfig.from_mapping(values, folder), [])
    asked = given.budgets if given else parse_budgets(budgets or base.config.budget)
    results, computed, reused = [], 0, 0
    for planned in plan(base, values, asked, wanted, width):
        # Model and data are loaded once for all methods.
        session = Session(
            planned.config,
            base.store,
            base.device,
            model=base.model,
            calibration=base.calibration,
            evaluation=base.evaluation,
        )
        context = handing(replace(given, session=session, observer=terminal_progress())) if given else nullcontext()
        model, method = planned.config.model.display_name, planned.method.name
        with context, tags("mlorq", "compare", f"model:{model}", f"method:{method}"):
            found = method_flow(model, method, planned.config.model_dump(mode="json"), folder, planned.budget.to_json())
        results.append((planned, found["results"][0]))
        computed, reused = computed + found["steps"]["computed"], reused + found["steps"]["reused"]
    rows = [row(*result) for result in results]
    about = "; ".join([f"{rows[0]['model']}: methods compared at the same size", *notes(rows)])
    show("compare", lambda key: create_table_artifact(key=key, table=rows, description=about))
    took = format_seconds(time.perf_counter() - started)
    get_run_logger().info("%d methods, %d budgets, in %s", len(wanted), len(asked), took)
    return {
        "rows": rows,
        "results": [result for _, result in results],
        "files": keep(base, rows),
        "steps": {"computed": computed, "reused": reused},
        "wall_seconds": round(time.perf_counter() - started, 3),
    }


def keep(session: Session, rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Write the table to the store unless it exists; returns the files' URIs, or None if it cannot be written."""
    store = session.store
    stable = [{name: value for name, value in one.items() if name != "seconds"} for one in rows]
    ref = ArtifactRef(ARTIFACT, digest_json({"rows": stable, "version": 1}))
    try:
        if not store.exists(ref):
            store.write(ARTIFACT, ref.key, table_files(rows), details={"runs": [one["run"] for one in rows]})
    except MlorqError as error:
        get_run_logger().warning("the table is not in the store: %s", error)
        return None
    return {"table": store.uri(ref, TABLE), "page": store.uri(ref, PAGE), "rows": store.uri(ref, ROWS)}


def table_files(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The table as Parquet, as a self-contained page, and as JSON, by file name."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(one) for one in rows]), buffer)
    title = f"{rows[0]['model']}: {', '.join(dict.fromkeys(str(one['budget']) for one in rows))}"
    shown = [{name: one[name] for name in one if name not in NOT_ON_PAGE} for one in rows]
    return {
        TABLE: buffer.getvalue(),
        PAGE: render_table(title, shown),
        ROWS: json_bytes({"model": rows[0]["model"], "rows": [dict(one) for one in rows]}),
    }
