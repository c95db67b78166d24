"""The event that a model's search is finished, with which Prefect automations start further runs.

Runs of ``compress`` emit ``mlorq.search.finished`` once the costs of every layer's candidates are known, if they
computed any of them. A run that found all of them in the store emits nothing, and neither do ``rebudget`` and
``sweep``: otherwise repeated or chained runs would trigger further runs. The payload has the parameters of
``rebudget``. The deployments in ``prefect.yaml`` react to it, and to ``mlorq.rebudget.requested`` and
``mlorq.compare.requested``, which users send.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from typing import Any

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.locations import absolute_folder
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError
from steps.base import Outcome, StepSpec

LOGGER = logging.getLogger(__name__)
SEARCH_FINISHED = "mlorq.search.finished"
REBUDGET_REQUESTED = "mlorq.rebudget.requested"
COMPARE_REQUESTED = "mlorq.compare.requested"
PAYLOAD = "event payload: "  # start of the parameter ``config`` of a requested run; prefect.yaml has it, too
# Keys of payloads, with their types.
EXPECTED: dict[str, tuple[tuple[type, ...], str]] = {
    "config": ((dict, str), "a configuration, or the location of its file"),
    "folder": ((str,), "text"),
    "budgets": ((list,), 'a list such as ["3bit", "10%"]'),
    "methods": ((list,), 'a list of names such as ["gptq", "best"]'),
    "activations": ((int,), "a bit-width"),
}
SEARCH_STEPS = ("capture", "sensitivity")


def requested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a flow; if an event has requested the run, those in its payload.

    The triggers of ``prefect.yaml`` pass the whole payload as text, so that a wrong one ends a run with its reason. A
    template of its parts would not: Prefect drops events whose templates it cannot fill.

    Args:
        parameters: of the flow. ``config`` that starts with ``PAYLOAD`` is a payload in JSON.

    Raises:
        ConfigError: the payload lacks ``config``, or has an unknown key or a value of the wrong type.
    """
    given = dict(parameters)
    config = given.get("config")
    if not isinstance(config, str) or not config.startswith(PAYLOAD):
        return given
    payload = read_json(config.removeprefix(PAYLOAD))
    known = [name for name in EXPECTED if name in given]
    for key, value in payload.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{PAYLOAD}unknown key {str(key)[:60]!r}; {advice}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, EXPECTED[key][0])):
            raise ConfigError(f"{PAYLOAD}{key}: expected {EXPECTED[key][1]} (given: {value!r:.100})")
    if not payload.get("config"):
        raise ConfigError(f"{PAYLOAD}key 'config' is missing: a configuration, or the location of its file")
    return given | {name: payload.get(name) for name in known}


def read_json(text: str) -> dict[str, Any]:
    """A payload from its text.

    Raises:
        ConfigError: it is not a JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{PAYLOAD}it must be a JSON object with 'config'")
    return found


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
