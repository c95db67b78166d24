"""Flow ``sweep``: one model at several budgets, and its size–accuracy curve."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.failures import refused_name, shown_failures
from flows.naming import name_of_run
from flows.pipeline import run_on
from flows.render import budgets_table
from flows.run import handed, known_layers, prepare
from flows.run_form import ConfigFile, RunForm, read_config
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.budget import Budget, parse_budgets
from mlorq.errors import BudgetError, ConfigError, MlorqError
from mlorq.evaluation.page import render_sweep
from mlorq.evaluation.report import size_accuracy_picture
from mlorq.numbers import byte_count, byte_size, number
from steps.session import Session
from steps.smallest import Bisection, Keep

LADDER = ("2bit", "2.5bit", "3bit", "4bit", "6bit")
ARTIFACT = "sweep"  # its step name in the store; like a step's artifact, it has a key derived from its inputs
CURVE, PAGE, POINTS = "size-accuracy.png", "report.html", "sweep.json"


def sweep_name() -> str:
    """Name of a flow run: the model, and the budgets or what is asked for."""
    try:
        keep = Keep.of(flow_run.parameters)
    except MlorqError as error:
        return refused_name(error)
    return name_of_run(LADDER, "" if keep is None else str(keep))


@flow(name="sweep", flow_run_name=sweep_name, validate_parameters=False, persist_result=False, result_serializer="json")
def sweep_flow(
    config: RunForm | ConfigFile,
    folder: str = "",
    budgets: list[str] | None = None,
    max_drop: str | None = None,
    min_metric: float | None = None,
    max_metric: float | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Compress a model to several budgets with one search, and plot accuracy against size.

    With one of ``max_drop``, ``min_metric`` and ``max_metric``, the budgets are those of a bisection for the smallest
    model that keeps the metric.

    Args:
        config: model, data and settings; or the path of a configuration file. Its ``budget`` is ignored.
        folder: base of relative paths in the configuration; empty: the working directory.
        budgets: "3bit", "12.5%", "25MB"; default: those of 2, 2.5, 3, 4 and 6 bits that are possible for the model.
        max_drop: how much worse than the float model's the metric may be: "1%" of it, or a difference, "0.01".
        min_metric: the metric must be at least this.
        max_metric: the metric must be at most this.
        metric: its name; none: the main metric of the evaluation data.

    Returns:
        As ``compress_flow``, with ``curve``: ``{"picture", "page", "points"}``, URIs in the store; and ``smallest``:
        ``{"asked", "metric", "float", "bound", "found", "tried", …}`` if a metric is to be kept.
    """
    asked = {"max_drop": max_drop, "min_metric": min_metric, "max_metric": max_metric, "metric": metric}
    return carry_out(config, folder, budgets, asked)


@shown_failures()
def carry_out(config: Any, folder: str, budgets: Sequence[str] | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The body of ``sweep_flow``."""
    started = time.perf_counter()
    keep = Keep.of(asked)
    if keep is not None and budgets:
        raise ConfigError(f"{keep}: the budget is what is looked for: leave out budgets")
    run_config = read_config(config, folder)
    given = handed()
    # All budgets are checked below; an impossible default budget is skipped and is not an error.
    if keep is not None:
        session, smallest = given.session if given else prepare(run_config, []), Bisection(keep)
        found = run_on(session, [], started, smallest=smallest)
        found |= {"smallest": smallest.to_json(found["results"])}
        found["results"].sort(key=lambda result: int(result["bytes"]))
        found |= {"curve": keep_curve(session, found["results"], found["smallest"])}
        smallest.check_found()
        return found
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
        memory = "" if least.memory is None else f", {byte_count(least.memory)} of memory"
        raise BudgetError(
            f"budgets are too small: {', '.join(map(str, missed))}; the smallest possible is "
            f"{byte_count(least.bytes)} for the compressible layers ({bits:.3g} bits per weight){memory}"
        )
    return reached, missed


def keep_curve(
    session: Session, results: Sequence[dict[str, Any]], smallest: Mapping[str, Any] | None = None
) -> dict[str, str] | None:
    """Write a sweep's curve to the store unless it exists; returns the files' URIs, or None if it cannot be written.

    A read-only store is not an error: the result and Prefect's pages have the curve as well.

    Args:
        session: of the run.
        results: the runs' result objects.
        smallest: the account of a bisection, if the budgets are those of one.
    """
    store = session.store
    asked = {} if smallest is None else {"asked": smallest["asked"]}
    key = digest_json({"runs": sorted(result["run"] for result in results), "version": 2, **asked})
    ref = ArtifactRef(ARTIFACT, key)
    try:
        if not store.exists(ref):
            store.write(
                ARTIFACT, key, curve_files(results, smallest), details={"runs": [result["run"] for result in results]}
            )
    except MlorqError as error:
        get_run_logger().warning("the curve is not in the store: %s", error)
        return None
    return {"picture": store.uri(ref, CURVE), "page": store.uri(ref, PAGE), "points": store.uri(ref, POINTS)}


def curve_files(results: Sequence[dict[str, Any]], smallest: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """A sweep's picture, its self-contained page, and its rows as JSON, by file name.

    Args:
        results: the runs' result objects.
        smallest: the account of a bisection, if the budgets are those of one.
    """
    name, rows = results[0]["model"], budgets_table(results)
    marked = ((smallest or {}).get("found") or {}).get("run")
    picture = size_accuracy_picture(results, f"{name}: size and accuracy", highlight=marked)
    shown = [{column: value for column, value in row.items() if column != "checkpoint"} for row in rows]
    found = (smallest or {}).get("found") or {}
    page = render_sweep(
        f"{name}: {len(rows)} budgets",
        shown,
        results,
        [] if smallest is None else [found_line(smallest)],
        highlight=found.get("run"),
        least=None if smallest is None else smallest["bound"],
    )
    points = {"model": name, "points": rows} | ({} if smallest is None else {"smallest": dict(smallest)})
    return {CURVE: picture, PAGE: page, POINTS: json_bytes(points)}


def found_line(smallest: Mapping[str, Any]) -> str:
    """The outcome of a bisection in one sentence."""
    asked = "at least" if smallest["larger_is_better"] else "at most"
    about = f"{smallest['metric']} of {asked} {number(smallest['bound'], 4)} (float {number(smallest['float'], 4)})"
    found = smallest["found"]
    if found is None:
        return f"None of {len(smallest['tried'])} budgets gives {about}."
    reached = f"{found['budget']}, {byte_size(found['bytes'])}: {number(found['value'], 4)}"
    return f"The smallest model with {about} has {reached}; {len(smallest['tried'])} budgets were tried."
