"""Common work of flows and commands before the pipeline: its session, and all checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from flows import tracking
from flows.goal import keep_of
from flows.progress import Observer
from mlorq.config.budget import Budget
from mlorq.config.layer_overrides import check_overrides
from mlorq.config.run import RunConfig
from mlorq.models.layer_list import LayerList
from steps import layers as layers_step
from steps import search_index
from steps.allocations import check_budget
from steps.base import find
from steps.devices import devices
from steps.session import Session, open_store


@dataclass(frozen=True)
class Handed:
    """Objects that a command passes to its flow in addition to the flow's parameters, which are plain JSON.

    Attributes:
        session: checked, with model and data loaded.
        budgets: parsed; the flow's parameter has their texts, for display.
        observer: of the terminal.
        command: command line that computes missing steps, for messages.
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
    """Pass ``value`` to the flow that is called inside the context."""
    token = _HANDED.set(value)
    try:
        yield
    finally:
        _HANDED.reset(token)


def handed() -> Handed | None:
    """The object that the calling command passed; None if no command called the flow (in a deployment)."""
    return _HANDED.get()


# -- before -----------------------------------------------------------------------------------------------------


def open_session(config: RunConfig, *, to_estimate: bool = False) -> Session:
    """A session on the run's first device; nothing is loaded yet.

    If steps run in other processes, the flow's process only inspects model and data: it uses the CPU and leaves the
    devices to the steps.

    Args:
        config: of the run.
        to_estimate: no steps will run: use the device that they would have, if it is one of this machine.

    Raises:
        ConfigError: a device does not exist.
        StoreError: the protocol of the store's URL is unknown.
    """
    elsewhere = config.engine.runner != "threads" or (config.engine.steps != "inprocess" and not to_estimate)
    return Session(config, open_store(config), "cpu" if elsewhere else devices(config)[0])


def prepare(config: RunConfig, budgets: Sequence[Budget], *, allocate_only: bool = False) -> Session:
    """A session with model and data loaded, after all checks that are possible before the run.

    Args:
        config: of the run.
        budgets: of the run; rejected if the model cannot be compressed that far.
        allocate_only: whether only the integer programs will run. Evaluation data is not loaded then, and with the
            index of a finished search, neither are model and calibration data.

    Raises:
        MlorqError: the configuration, the model, the data, the store or a budget is wrong.
    """
    keep_of(config)
    session = open_session(config)
    if allocate_only and search_index.load(session) is not None:
        return session
    if not allocate_only:
        tracking.check(config)
    session.model  # noqa: B018  (loads it)
    session.calibration  # noqa: B018
    if not allocate_only:
        # Before the evaluation data, which can take long to load.
        check_budgets(session, known_layers(session), budgets)
        session.evaluation  # noqa: B018
        if find(layers_step.spec(session), session.store) is None:
            session.store.check_writable()
    return session


def known_layers(session: Session) -> LayerList:
    """The model's compressible layers, from the store if it has them; nothing is written."""
    spec = layers_step.spec(session)
    known = find(spec, session.store) is not None
    found = session.artifacts.layers(spec.ref) if known else layers_step.discover(session)
    check_overrides(session.config.search, found)
    return found


def check_budgets(session: Session, layers: LayerList, budgets: Sequence[Budget]) -> None:
    """Reject budgets below the size of the smallest candidates.

    Raises:
        BudgetError: a budget is too small; the message has the smallest possible size.
    """
    from flows.dry_run import least_of

    if not budgets:
        return
    least = least_of(session, layers)
    for budget in budgets:
        check_budget(budget, least)
