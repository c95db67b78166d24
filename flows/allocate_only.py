"""``rebudget --allocate-only``: the integer programs of further budgets, and nothing else.

With the index of the finished search (``steps.search_index``), neither the model nor the data is loaded, and torch is
not imported. Without one, both are loaded to compute the keys of the search's steps, which are looked up in the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING, Any

from flows.ledger import Ledger, results_json
from mlorq.config.budget import Budget
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, StoreError, hide_secrets
from steps import search_index
from steps.allocations import Allocated, Executor, Search, allocate_budgets, allocation_json
from steps.base import Outcome, StepSpec, execute, find
from steps.session import Session, open_store

if TYPE_CHECKING:
    from flows.progress import Observer

COMPUTED = ("allocate", "joint")


def allocate_only(config: RunConfig, budgets: Sequence[Budget], command: str) -> dict[str, Any]:
    """Solve the integer programs in this process, without Prefect.

    Args:
        config: of the run that searched the model.
        budgets: the budgets.
        command: command line that computes missing steps.

    Returns:
        As ``found_json``.

    Raises:
        MlorqError: the search is not in the store, no budget is possible, or another input is wrong.
    """
    from flows.progress import terminal_progress

    started = time.perf_counter()
    session = Session(config, open_store(config))
    if search_index.load(session) is None:
        from flows.run import prepare

        session = prepare(config, budgets, allocate_only=True)
    with closing(terminal_progress()) as observer:
        executor = AllocateOnly(session, observer, command)
        search = finished_search(session, executor)
        allocated = allocate_budgets(session, executor, search, budgets)
    return found_json(session, executor.ledger, allocated, started)


def finished_search(session: Session, executor: Executor) -> Search:
    """The search of a configuration, from its index or else from its steps, all of which are looked up in the store.

    Args:
        session: of the run; with model and data loaded, if there is no index.
        executor: rejects steps that are missing.

    Raises:
        StoreError: a step is not in the store.
    """
    search = session.search
    if search is None:
        from steps.pipeline import run_search

        search = run_search(session, executor)
        search_index.keep(session, search)
        return search
    for phase, chosen in groupby(search.specs, key=lambda spec: spec.step):
        steps = list(chosen)
        executor.phase(phase, len(steps))
        executor.map(steps)
    return search


def found_json(session: Session, ledger: Ledger, allocated: Allocated, started: float) -> dict[str, Any]:
    """The return value of ``rebudget`` with ``allocate_only``.

    ``flows.ledger.results_json`` of the possible budgets, and ``errors``: ``{"budget": …, "error": …}`` of the others.

    Raises:
        BudgetError: no budget is possible.
    """
    if not allocated.results:
        raise BudgetError("; ".join(dict.fromkeys(str(error) for _, error in allocated.impossible)))
    found = results_json(ledger, allocated.results, started, lambda result: allocation_json(session, result))
    errors = [{"budget": budget.text, "error": str(error)} for budget, error in allocated.impossible]
    return found | {"errors": errors}


def check_present(spec: StepSpec, session: Session, command: str) -> None:
    """Reject a missing step that ``--allocate-only`` does not compute.

    Raises:
        StoreError: the step is not in the store; the message has the command that computes it.
    """
    if spec.step not in COMPUTED:
        raise StoreError(
            f"step {spec.label!r} of this configuration is not in the store {hide_secrets(session.store.url)}; "
            f"run first: {command}"
        )


class AllocateOnly:
    """Implements ``steps.allocations.Executor`` without Prefect: computes allocations, and looks all other steps up.

    Args:
        session: model, data and store.
        observer: receives the progress.
        command: command line that computes missing steps.
    """

    def __init__(self, session: Session, observer: Observer, command: str) -> None:
        self.session = session
        self.observer = observer
        self.command = command
        self.ledger = Ledger()

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """Announce the next phase: ``total`` steps of one kind, of one budget unless ``budget`` is empty."""
        self.observer.phase(name, total, budget)

    def run(self, spec: StepSpec) -> Outcome:
        """Find a step's artifact, or compute it if it is an allocation."""
        outcome = find(spec, self.session.store)
        if outcome is None:
            check_present(spec, self.session, self.command)
            self.session.store.check_writable()
            self.observer.step_started(spec)
            outcome = execute(spec, self.session.worker)
        self.ledger.add(spec, outcome)
        self.observer.step_finished(spec, outcome)
        return outcome

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """``run`` for every step."""
        return [self.run(spec) for spec in specs]
