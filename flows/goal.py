"""Whether the models of a run keep the metric that its configuration asks for (``goal``); the event that says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flows.render import result_line
from mlorq.artifacts.hashing import digest_json
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError, MlorqError
from mlorq.numbers import number
from steps.smallest import Keep

LOGGER = logging.getLogger(__name__)
RUN_FINISHED = "mlorq.run.finished"
GOAL_MISSED = "mlorq.goal.missed"


def keep_of(config: RunConfig) -> Keep | None:
    """What the configuration asks for.

    Raises:
        ConfigError: it is not exactly one bound, or a wrong one.
    """
    if config.goal is None:
        return None
    try:
        return Keep(**config.goal.model_dump())
    except ConfigError as error:
        raise ConfigError(f"goal: {error}") from None


def goal_json(config: RunConfig, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether a model keeps the metric: ``{"asked", "kept", "about"}``; None without a goal, or without an evaluation.

    Args:
        config: of the run.
        result: the model's result object.
    """
    keep = keep_of(config)
    if keep is None or not result.get("metrics"):
        return None
    try:
        bound = keep.bound((result["metric"] or {}).get("name"), result["metrics"]["float"])
    except MlorqError as error:  # the work is done: the result tells
        return {"asked": str(keep), "kept": False, "about": str(error)}
    found = result["metrics"]["compressed"].get(bound.metric, float("nan"))
    asked = "at least" if bound.larger_is_better else "at most"
    about = f"{bound.metric} {number(found, 4)}, asked for: {asked} {number(bound.value, 4)}"
    return {"asked": str(keep), "kept": bound.is_kept(found), "about": about}


def announce(model: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Emit ``mlorq.run.finished``, or ``mlorq.goal.missed`` if a model misses its goal, once a run.

    If Prefect does not accept the event, the run goes on.

    Args:
        model: its short name.
        results: the result objects.
    """
    missed = [result for result in results if not (result.get("goal") or {"kept": True})["kept"]]
    event = GOAL_MISSED if missed else RUN_FINISHED
    lines = [result_line(result) + _about(result) for result in results]
    try:
        from prefect.events import emit_event

        key = digest_json([result["run"] for result in results])
        resource = {"prefect.resource.id": f"mlorq.run.{key}", "prefect.resource.name": model}
        payload = {"model": model, "text": "\n".join(lines), "runs": [result["run"] for result in results]}
        emit_event(event, resource=resource, payload=payload)
    except Exception as error:
        LOGGER.warning("event %s was not sent: %r", event, error)


def _about(result: Mapping[str, Any]) -> str:
    goal = result.get("goal")
    return "" if goal is None else f" ({'goal kept' if goal['kept'] else 'goal missed'}: {goal['about']})"
