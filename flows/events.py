"""Tells the Prefect server that a model was searched, so that automations can go on from there.

``mlorq.search.finished`` is emitted once the costs of every layer's candidates are known, by runs of ``compress`` that
computed some of them. A run that found them all in the store has nothing to tell, and ``rebudget`` and ``sweep`` never
tell anything: neither a repeated run nor a chain of runs goes on by itself. The payload is what ``rebudget`` takes. The
deployments in ``prefect.yaml`` listen for it, and for ``mlorq.rebudget.requested`` and ``mlorq.compare.requested``,
which are the user's to send.
"""

from __future__ import annotations

import logging
from typing import Any

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.locations import absolute_folder
from mlorq.config.run import RunConfig
from steps.base import Outcome, StepSpec

LOGGER = logging.getLogger(__name__)
SEARCH_FINISHED = "mlorq.search.finished"
REBUDGET_REQUESTED = "mlorq.rebudget.requested"
COMPARE_REQUESTED = "mlorq.compare.requested"
SEARCH_STEPS = ("capture", "sensitivity")


class SearchWatch:
    """Implements ``flows.progress.Observer``: emits the event when the last of the search's steps is done.

    To be told of a run from its start, inside the flow run. What Prefect cannot take is left out: an event never fails
    a run.

    Args:
        config: of the run.
        model: its short name.
        budgets: that the run is for.
    """

    def __init__(self, config: RunConfig, model: str, budgets: list[str]) -> None:
        self._config = config
        self._model = model
        self._budgets = budgets
        self._keys: set[str] = set()
        self._computed = False
        self._phase = ""

    def phase(self, name: str, total: int) -> None:
        """``total`` steps of a kind come next; the phase before is over."""
        if self._phase == SEARCH_STEPS[-1] and self._computed:
            self._emit()
        self._phase = name

    def step_finished(self, spec: StepSpec, outcome: Outcome) -> None:
        """A step's artifact is there, computed now or reused."""
        if spec.step in SEARCH_STEPS:
            self._keys.add(spec.key)
            self._computed |= not outcome.reused

    def _emit(self) -> None:
        try:
            from prefect.events import emit_event

            key = digest_json(sorted(self._keys))
            resource = {
                "prefect.resource.id": f"mlorq.search.{key}",
                "prefect.resource.name": self._model,
                "mlorq.artifacts.store": self._config.resolve(self._config.store),
            }
            emit_event(SEARCH_FINISHED, resource=resource, payload=self._payload())
        except Exception as error:
            LOGGER.warning("event %s was not sent: %r", SEARCH_FINISHED, error)

    def _payload(self) -> dict[str, Any]:
        return {
            "model": self._model,
            "config": self._config.model_dump(mode="json"),
            "folder": absolute_folder(self._config.folder),
            "budgets": self._budgets,
        }

    # -- nothing to tell about the rest ------------------------------------------------------------------------

    def step_started(self, spec: StepSpec) -> None:
        """A step is being computed."""

    def step_progress(self, spec: StepSpec, done: int, total: int) -> None:
        """A step that is being computed has done some of its units."""

    def step_failed(self, spec: StepSpec) -> None:
        """A step ended without an artifact."""

    def close(self) -> None:
        """The run is over."""
