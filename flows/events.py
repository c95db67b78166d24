"""The event that a model's search is finished, with which Prefect automations start further runs.

Runs of ``compress`` emit ``mlorq.search.finished`` once the costs of every layer's candidates are known, if they
computed any of them. A run that found all of them in the store emits nothing, and neither do ``rebudget`` and
``sweep``: otherwise repeated or chained runs would trigger further runs. The payload has the parameters of
``rebudget``. The deployments in ``prefect.yaml`` react to it, and to ``mlorq.rebudget.requested`` and
``mlorq.compare.requested``, which users send.
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
    """Implements ``flows.progress.Observer``: emits the event when the last step of the search has finished.

    It must observe a run from its start, inside the flow run. If Prefect does not accept the event, the run continues.

    Args:
        config: of the run.
        model: its short name.
        budgets: of the run.
    """

    def __init__(self, config: RunConfig, model: str, budgets: list[str]) -> None:
        self._config = config
        self._model = model
        self._budgets = budgets
        self._keys: set[str] = set()
        self._computed = False
        self._phase = ""

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """The next phase, ``total`` steps of one kind, begins; the previous one is over."""
        if self._phase == SEARCH_STEPS[-1] and self._computed:
            self._emit()
        self._phase = name

    def step_finished(self, spec: StepSpec, outcome: Outcome) -> None:
        """A step has finished, computed or reused."""
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

    # -- ignored ----------------------------------------------------------------------------------------------

    def step_started(self, spec: StepSpec) -> None:
        """A step has started."""

    def step_progress(self, spec: StepSpec, done: int, total: int) -> None:
        """A running step has made progress."""

    def step_failed(self, spec: StepSpec) -> None:
        """A step has failed."""

    def close(self) -> None:
        """The run is over."""
