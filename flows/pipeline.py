"""The body that the flows share: one pipeline, carried out by Prefect tasks, with its result as Prefect artifacts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run

from flows.executor import PrefectExecutor
from flows.progress import Observers, PrefectProgress
from flows.render import result_markdown
from flows.run import handed, prepare, results_json
from mlorq.config import RunConfig
from mlorq.errors import MlorqError
from steps.pipeline import run_pipeline
from steps.summary import model_name, short_name
from steps.workbench import devices


def run_name() -> str:
    """Name of a flow run: the model and the budgets."""
    parameters = flow_run.parameters
    try:
        config = RunConfig.from_mapping(parameters["config"], parameters.get("folder") or "")
    except MlorqError:
        return "of a wrong configuration"  # which the flow then says, so that the run counts as failed
    budgets = parameters.get("budgets") or config.budgets
    # Of a factory package:function, the package says more.
    name = (config.model.factory or "").partition(":")[0] or short_name(config)
    return f"{name} {' '.join(budgets)}"


def carry_out(
    config: Mapping[str, Any], folder: str, budgets: Sequence[str] | None, *, allocate_only: bool = False
) -> dict[str, Any]:
    """Run the pipeline inside a flow run; ``flows.run.results_json`` says what comes back.

    Args:
        config: of the run, as plain values.
        folder: that relative paths start from.
        budgets: instead of the configuration's.
        allocate_only: stop after the integer programs, and compute nothing else.

    Raises:
        MlorqError: the input is at fault.
    """
    started = time.perf_counter()
    run_config = RunConfig.from_mapping(dict(config), folder)
    budgets = list(budgets or run_config.budgets)
    given = handed()
    bench = given.bench if given else prepare(run_config, budgets, allocate_only=allocate_only)
    subject = f"{model_name(bench)} {' '.join(budgets)}"
    observer = Observers([PrefectProgress(subject), *([given.observer] if given else [])])
    only = (given.command if given else "the compress flow") if allocate_only else None
    interrupted = given.interrupted if given else None
    workers = PrefectExecutor(bench, observer, devices(run_config), allocate_only=only, interrupted=interrupted)
    try:
        with closing(observer), workers as executor:
            results = run_pipeline(bench, executor, budgets, allocate_only=allocate_only)
    finally:
        if given is not None:
            given.record(str(flow_run.id), workers.task_runs)
    found = results_json(bench, workers.ledger, results, started)
    for result in found["results"]:
        create_table_artifact(
            key="allocation", table=result["allocation"], description=f"{result['run']}: what every layer became"
        )
        create_markdown_artifact(key="result", markdown=result_markdown(result), description=result["run"])
    return found
