"""The common body of the flows: the pipeline, run as Prefect tasks, with its result as Prefect artifacts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.allocate_only import finished_search, found_json
from flows.events import SearchWatch, requested
from flows.executor import PrefectExecutor
from flows.failures import shown_failures
from flows.goal import announce as announce_results
from flows.goal import goal_json
from flows.ledger import Account, results_json
from flows.page import PAGE, keep_page, made_json
from flows.progress import Observer, Observers, PrefectProgress, format_seconds
from flows.render import budgets_table, picture_markdown, result_line, result_markdown
from flows.run import handed, prepare
from flows.run_form import read_config
from flows.tracking import track
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.config.budget import Budget, parse_budgets
from mlorq.errors import MlorqError, hide_secrets
from mlorq.evaluation.report import size_accuracy_picture
from steps.allocations import Allocated, Compressed, allocate_budgets
from steps.devices import local_devices
from steps.pipeline import result_json, run_pipeline
from steps.session import Session
from steps.smallest import Bisection

P = ParamSpec("P")
T = TypeVar("T")
STORE_PAGES = "MLORQ_STORE_PAGES"  # variable of the environment: the address at which browsers reach the store


@shown_failures()
def carry_out(parameters: Mapping[str, Any], *, allocate_only: bool = False, announce: bool = False) -> dict[str, Any]:
    """Run the pipeline inside a flow run; returns ``flows.ledger.results_json``, with ``errors`` if ``allocate_only``.

    Args:
        parameters: of the flow: ``config``, as plain values, or the location of its file, or an event's payload
            (``flows.events.requested``); ``folder``, the base of relative paths; ``budgets``, which override the
            configuration's.
        allocate_only: compute nothing but the integer programs.
        announce: emit an event when the search is finished (``flows.events``).

    Raises:
        MlorqError: the input is wrong.
    """
    started = time.perf_counter()
    parameters = requested(parameters)
    run_config = read_config(parameters["config"], parameters["folder"] or "")
    given = handed()
    parsed = given.budgets if given else parse_budgets(parameters["budgets"] or run_config.budget)
    session = given.session if given else prepare(run_config, parsed, allocate_only=allocate_only)
    return run_on(session, parsed, started, allocate_only=allocate_only, announce=announce)


def _in_use(function: Callable[Concatenate[Session, P], T]) -> Callable[Concatenate[Session, P], T]:
    """Let nobody remove artifacts of the session's store until a function has returned."""

    @wraps(function)
    def call(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with session.in_use():
            return function(session, *args, **kwargs)

    return call


@_in_use
def run_on(
    session: Session,
    budgets: Sequence[Budget],
    started: float,
    *,
    allocate_only: bool = False,
    announce: bool = False,
    smallest: Bisection | None = None,
) -> dict[str, Any]:
    """``carry_out`` for a session whose model and data are loaded and checked.

    Args:
        session: of the run.
        budgets: of the run.
        started: time at which it began, by ``time.perf_counter``.
        allocate_only, announce: as for ``carry_out``.
        smallest: gives further budgets.
    """
    config, log = session.config, get_run_logger()
    texts, shown = [budget.text for budget in budgets], [str(budget) for budget in budgets]
    shown += [] if smallest is None else [str(smallest)]
    subject = f"{session.config.model.display_name} {' '.join(shown)}"
    log.info("%s: on %s, store %s", subject, ", ".join(local_devices(config)), hide_secrets(session.store.url))
    given = handed()
    observers: list[Observer] = [PrefectProgress(session.config.model.display_name, shown)]
    observers += [SearchWatch(config, session.config.model.display_name, texts)] if announce else []
    observers += [given.observer] if given else []
    observer = Observers(observers)
    only = (given.command if given else "the compress flow") if allocate_only else None
    interrupted = given.interrupted if given else None
    workers = PrefectExecutor(session, observer, local_devices(config), allocate_only=only, interrupted=interrupted)
    allocated = Allocated()
    try:
        with closing(observer), workers as executor:
            if allocate_only:
                search = finished_search(session, executor)
                allocated = allocate_budgets(session, executor, search, budgets)
                results = allocated.results
            else:
                results = run_pipeline(session, executor, budgets, smallest)
    finally:
        if given is not None:
            given.record(str(flow_run.id), workers.task_runs)
    if allocate_only:
        found = found_json(session, workers.ledger, allocated, started)
        for row in found["errors"]:
            log.error("%s", row["error"])
    else:
        found = results_json(workers.ledger, results, started, lambda result: result_json(session, result))
    accounts = workers.ledger.accounts([one.summary or one.allocation for one in results])
    for compressed, result, account in zip(results, found["results"], accounts, strict=True):
        log.info("%s", result_line(result))
        if (goal := goal_json(config, result)) is not None:
            result["goal"] = goal
            log.log(logging.INFO if goal["kept"] else logging.WARNING, "%s: %s", result["run"], goal["about"])
        for warning in (result.get("calibration") or {}).get("warnings", ()):
            log.warning("%s: %s", result["run"], warning)
        _show_result(session, compressed, result, account)
        if compressed.summary is not None and config.tracking is not None:
            result["tracking"] = track(session, result, compressed.summary, log)
    rows, about = budgets_table(found["results"]), f"{subject}: the result"
    show("budgets", lambda key: create_table_artifact(key=key, table=rows, description=about))
    if len(found["results"]) > 1 and not allocate_only:
        _show_curve(found["results"], f"{session.config.model.display_name}: size and accuracy")
    if not allocate_only:
        announce_results(session.config.model.display_name, found["results"])
    steps = found["steps"]
    took = format_seconds(found["wall_seconds"])
    log.info("%d steps computed, %d reused, in %s", steps["computed"], steps["reused"], took)
    return found


# -- pages in Prefect's UI ----------------------------------------------------------------------------------------


def show(key: str, create: Callable[[str], object]) -> None:
    """Create a Prefect artifact. The result is in the store, so a failure here is only logged."""
    try:
        create(key)
    except Exception as error:
        get_run_logger().warning("artifact %r could not be created: %r", key, error)


def page_address(store: Store, ref: ArtifactRef, name: str) -> str:
    """Address of a file of the store for a browser, below ``STORE_PAGES`` if it is set; else its URI."""
    base = os.environ.get(STORE_PAGES, "").rstrip("/")
    return hide_secrets(f"{base}/{ref.step}/{ref.key}/{name}") if base else store.uri(ref, name)


def _show_curve(results: Sequence[dict[str, Any]], title: str) -> None:
    """Create an artifact with the size–accuracy plot."""
    markdown = picture_markdown(title, size_accuracy_picture(results, title))
    show("size-accuracy", lambda key: create_markdown_artifact(key=key, markdown=markdown, description=title))


def _show_result(session: Session, compressed: Compressed, result: dict[str, Any], account: Account) -> None:
    """Create one budget's pages: its report in the store, a table of its layers, its totals with links, the fronts."""
    run = result["run"]
    table, about = result["allocation"], f"{run}: the chosen candidate of every layer"
    show("allocation", lambda key: create_table_artifact(key=key, table=table, description=about))
    files: dict[str, str] = {}
    if compressed.summary is not None:
        store, summary = session.store, compressed.summary
        try:
            made = made_json(session.config, compressed.budget, account)
            files[PAGE] = page_address(store, keep_page(store, summary, result, made), PAGE)
        except Exception as error:  # the result is in the store; a read-only one cannot take the page
            get_run_logger().warning("no page of %s: %r", run, error)
        files |= {name: page_address(store, summary, name) for name in ("report.png", "run.json")}
        try:
            picture = picture_markdown(run, store.read_bytes(summary, "report.png"))
        except MlorqError as error:
            get_run_logger().warning("no picture of %s: %s", run, error)
        else:
            fronts = f"{run}: candidates of all layers, and the chosen ones"
            show("pareto", lambda key: create_markdown_artifact(key=key, markdown=picture, description=fronts))
    page = result_markdown(result, files)
    show("result", lambda key: create_markdown_artifact(key=key, markdown=page, description=run))
