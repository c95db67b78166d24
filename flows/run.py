"""What every flow and command does before and after the pipeline: check all that can be known, put results together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from flows.ledger import Ledger
from flows.progress import Observer
from mlorq.artifacts.transfer import hide_password
from mlorq.config.budget import Budget
from mlorq.config.layer_overrides import check_overrides
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, StoreError
from mlorq.models.layers import LayerList
from steps import layers as layers_step
from steps.base import Outcome, StepSpec, execute, find
from steps.devices import devices
from steps.pipeline import Compressed, compressible_budget, result_json
from steps.session import Session, open_store

COMPUTED_BY_ALLOCATE_ONLY = ("allocate", "joint", "refine")


@dataclass(frozen=True)
class Handed:
    """What a command hands to the flow it calls beside the flow's parameters, which are plain JSON.

    Attributes:
        session: already checked, with model and data loaded.
        budgets: parsed; the flow's parameter has their texts, for people.
        observer: of the terminal.
        command: that computes what is missing, for messages.
        record: called with the flow run's id and the number of its task runs.
        interrupted: set by Ctrl-C.
    """

    session: Session
    budgets: Sequence[Budget]
    observer: Observer
    command: str
    record: Callable[[str, int], None]
    interrupted: threading.Event


_HANDED: ContextVar[Handed | None] = ContextVar("handed", default=None)


@contextmanager
def handing(value: Handed) -> Iterator[None]:
    """Hand something to the flow that is called inside."""
    token = _HANDED.set(value)
    try:
        yield
    finally:
        _HANDED.reset(token)


def handed() -> Handed | None:
    """What the calling command handed over; None where a flow runs by itself, in a deployment."""
    return _HANDED.get()


# -- before -----------------------------------------------------------------------------------------------------


def open_session(config: RunConfig, *, to_estimate: bool = False) -> Session:
    """A session on the run's first device; nothing is loaded yet.

    Where steps run elsewhere, the flow's own process only looks at model and data: on the CPU, which leaves the devices
    to the steps.

    Args:
        config: the run's.
        to_estimate: no steps will run: take the device that they would have, as far as it is this machine's.

    Raises:
        ConfigError: a device is not there.
        StoreError: the store's URL is of no known kind.
    """
    elsewhere = config.engine.runner == "dask" or (config.engine.steps != "inprocess" and not to_estimate)
    return Session(config, open_store(config), "cpu" if elsewhere else devices(config)[0])


def prepare(config: RunConfig, budgets: Sequence[Budget], *, allocate_only: bool = False) -> Session:
    """A workbench with model and data loaded and everything checked that can be before long work.

    Args:
        config: the run's configuration.
        budgets: of the run; those that the model cannot be made small enough for are refused.
        allocate_only: whether nothing but integer programs is to be run: evaluation data is not needed then.

    Raises:
        MlorqError: of the kind that fits what is wrong.
    """
    session = open_session(config)
    session.model  # noqa: B018  (loads it)
    session.calibration  # noqa: B018
    if not allocate_only:
        session.evaluation  # noqa: B018
        if find(layers_step.spec(session), session.store) is None:
            session.store.check_writable()
        check_budgets(session, known_layers(session), budgets)
    return session


def known_layers(session: Session) -> LayerList:
    """The model's compressible layers, from the store where it has them; the store is only read."""
    spec = layers_step.spec(session)
    known = find(spec, session.store) is not None
    found = session.artifacts.layers(spec.ref) if known else layers_step.discover(session)
    check_overrides(session.config.search, found)
    return found


def check_budgets(session: Session, layers: LayerList, budgets: Sequence[Budget]) -> None:
    """Refuse budgets that not even the smallest candidates fit.

    Raises:
        BudgetError: names the smallest possible size.
    """
    from flows.dry_run import smallest_layer_bytes

    smallest = sum(smallest_layer_bytes(layer, session.config.search) for layer in layers.layers)
    for budget in budgets:
        allowed = compressible_budget(session, layers.layers, budget)
        if allowed < smallest:
            raise BudgetError(
                f"budget {budget} leaves {allowed} bytes for the compressible layers: the smallest possible is "
                f"{smallest} bytes ({8 * smallest / layers.params:.3g} bits per weight)"
            )


# -- executors that need no Prefect -----------------------------------------------------------------------------


def check_present(spec: StepSpec, session: Session, command: str) -> None:
    """Refuse a step that ``--allocate-only`` does not compute.

    Raises:
        StoreError: names the step and the command that computes it.
    """
    if spec.step not in COMPUTED_BY_ALLOCATE_ONLY:
        raise StoreError(
            f"step {spec.label!r} of this configuration is not in the store {hide_password(session.store.url)}; "
            f"run first: {command}"
        )


class AllocateOnly:
    """Implements ``steps.pipeline.Executor`` without Prefect: finds every step and computes allocations alone.

    Args:
        session: model, data and store.
        observer: told what happens.
        command: that computes what is missing.
    """

    def __init__(self, session: Session, observer: Observer, command: str) -> None:
        self.session = session
        self.observer = observer
        self.command = command
        self.ledger = Ledger()

    def phase(self, name: str, total: int) -> None:
        """Announce that ``total`` steps of a kind come next."""
        self.observer.phase(name, total)

    def run(self, spec: StepSpec) -> Outcome:
        """Find a step's artifact; compute it where it is an allocation."""
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
        """Find the steps' artifacts."""
        return [self.run(spec) for spec in specs]


# -- after ------------------------------------------------------------------------------------------------------


def results_json(session: Session, ledger: Ledger, results: Sequence[Compressed], started: float) -> dict[str, Any]:
    """What a flow returns: ``results``, one public object a budget, ``steps`` and ``wall_seconds`` of the run.

    Args:
        session: of the run.
        ledger: of the run.
        results: one a budget.
        started: when the run began, by ``time.perf_counter``.
    """
    accounts = ledger.accounts([result.summary or result.allocation for result in results])
    objects = []
    for result, account in zip(results, accounts, strict=True):
        objects.append(result_json(session, result) | {"steps": account.steps, "seconds": account.seconds})
    return {"results": objects, "steps": ledger.steps, "wall_seconds": round(time.perf_counter() - started, 3)}
