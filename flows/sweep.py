"""Flow ``sweep``: one model at several budgets, and its size–accuracy curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.failures import shown_failures
from flows.pipeline import name_of_run, run_on
from flows.render import budgets_table
from flows.run import handed, known_layers, prepare
from flows.run_form import ConfigFile, RunForm, read_config
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.budget import Budget, parse_budgets
from mlorq.errors import BudgetError, MlorqError
from mlorq.evaluation.page import render_sweep
from mlorq.evaluation.report import size_accuracy_picture
from steps.session import Session

LADDER = ("2bit", "2.5bit", "3bit", "4bit", "6bit")
ARTIFACT = "sweep"  # its step name in the store; like a step's artifact, it has a key derived from its inputs
CURVE, PAGE, POINTS = "size-accuracy.png", "report.html", "sweep.json"


def sweep_name() -> str:
    """Name of a flow run: the model and the budgets."""
    return name_of_run(LADDER)


@flow(name="sweep", flow_run_name=sweep_name, validate_parameters=False, persist_result=False, result_serializer="json")
def sweep_flow(config: RunForm | ConfigFile, folder: str = "", budgets: list[str] | None = None) -> dict[str, Any]:
    """Compress a model to several budgets with one search, and plot accuracy against size.

    Args:
        config: model, data and settings; or the path of a configuration file. Its ``budget`` is ignored.
        folder: base of relative paths in the configuration; empty: the working directory.
        budgets: "3bit", "12.5%", "25MB"; default: those of 2, 2.5, 3, 4 and 6 bits that are possible for the model.

    Returns:
        As ``compress_flow``, with ``curve``: ``{"picture", "page", "points"}``, URIs in the store.
    """
    return carry_out(config, folder, budgets)


@shown_failures()
def carry_out(config: Any, folder: str, budgets: Sequence[str] | None) -> dict[str, Any]:
    """The body of ``sweep_flow``."""
    started = time.perf_counter()
    run_config = read_config(config, folder)
    given = handed()
    # All budgets are checked below; an impossible default budget is skipped and is not an error.
    if given is not None:
        session, chosen = given.session, list(given.budgets)
    else:
        session = prepare(run_config, [])
        chosen, left_out = ladder(session, None if budgets is None else parse_budgets(budgets))
        if left_out:
            get_run_logger().warning("%s", left_out_note(left_out))
    found = run_on(session, chosen, started)
    return found | {"curve": keep_curve(session, found["results"])}


def left_out_note(budgets: Sequence[Budget]) -> str:
    """A message about the skipped budgets."""
    return f"skipped budgets, too small for the model: {', '.join(map(str, budgets))}"


def ladder(session: Session, budgets: Sequence[Budget] | None) -> tuple[list[Budget], list[Budget]]:
    """The budgets of a sweep, and the default budgets that are skipped because they are too small for the model.

    Args:
        session: with model and data loaded.
        budgets: the user's; None: the default ones.

    Raises:
        BudgetError: ``budgets`` is empty, or some of them are below the size of the smallest candidates.
    """
    from flows.dry_run import is_possible, least_of

    if budgets is not None and not budgets:
        raise BudgetError("budgets: none is given; give at least one, or leave them out for the default ones")
    least = least_of(session, known_layers(session))
    asked = list(dict.fromkeys(budgets or parse_budgets(LADDER)))
    reached = [budget for budget in asked if is_possible(budget, least)]
    missed = [budget for budget in asked if budget not in reached]
    if missed and (budgets or not reached):
        bits = 8 * least.bytes / least.params
        memory = "" if least.memory is None else f", {least.memory} bytes of memory"
        raise BudgetError(
            f"budgets are too small: {', '.join(map(str, missed))}; the smallest possible is {least.bytes} bytes for "
            f"the compressible layers ({bits:.3g} bits per weight){memory}"
        )
    return reached, missed


def keep_curve(session: Session, results: Sequence[dict[str, Any]]) -> dict[str, str] | None:
    """Write a sweep's curve to the store unless it exists; returns the files' URIs, or None if it cannot be written.

    A read-only store is not an error: the result and Prefect's pages have the curve as well.
    """
    store = session.store
    key = digest_json({"runs": sorted(result["run"] for result in results), "version": 2})
    ref = ArtifactRef(ARTIFACT, key)
    try:
        if not store.exists(ref):
            store.write(ARTIFACT, key, curve_files(results), details={"runs": [result["run"] for result in results]})
    except MlorqError as error:
        get_run_logger().warning("the curve is not in the store: %s", error)
        return None
    return {"picture": store.uri(ref, CURVE), "page": store.uri(ref, PAGE), "points": store.uri(ref, POINTS)}


def curve_files(results: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """A sweep's picture, its self-contained page, and its rows as JSON, by file name."""
    name, rows = results[0]["model"], budgets_table(results)
    picture = size_accuracy_picture(results, f"{name}: size and accuracy")
    shown = [{column: value for column, value in row.items() if column != "checkpoint"} for row in rows]
    return {
        CURVE: picture,
        PAGE: render_sweep(f"{name}: {len(rows)} budgets", shown, results),
        POINTS: json_bytes({"model": name, "points": rows}),
    }
