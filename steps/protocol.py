"""The protocol of a step in its own process: input one JSON description, output one JSON event per line.

A description holds everything that a step in another process or container needs; that process opens the store and
loads model and data itself. Events are ``progress`` (done, total) and finally ``done`` (the artifact) or ``error`` (its
kind, message, and whether it is transient). Neither holds credentials: those come from the environment.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from mlorq.artifacts.store import ArtifactRef
from mlorq.config.run import RunConfig
from mlorq.errors import KINDS, MlorqError, StoreError, TransientError
from steps.base import Outcome, StepSpec, execute
from steps.context import Worker
from steps.faults import is_transient
from steps.session import open_worker

Event = dict[str, Any]


@dataclass(frozen=True)
class Description:
    """A step to run, and where.

    Attributes:
        spec: the step.
        config: the run's configuration.
        device: its name in the process that runs the step.
    """

    spec: StepSpec
    config: RunConfig
    device: str = "cpu"

    def to_bytes(self) -> bytes:
        """JSON, read back by ``read``."""
        values = {
            "spec": self.spec.to_json(),
            "config": self.config.model_dump(mode="json"),
            "folder": self.config.folder,
            "device": self.device,
        }
        return json.dumps(values).encode()

    @classmethod
    def read(cls, uri: str, step: str) -> Description:
        """The description at an fsspec URI.

        Args:
            uri: of a JSON file.
            step: name of the expected step.

        Raises:
            StoreError: the description is missing, malformed, or for another step.
            ConfigError: its configuration is wrong.
        """
        try:
            with fsspec.open(uri, "rb") as file:
                values = json.load(file)
            spec = StepSpec.from_json(values["spec"])
            config, folder, device = values["config"], values["folder"], values["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"step description {uri:.200}: {error!r}") from error
        if spec.step != step:
            raise StoreError(f"step description {uri:.200} is for step {spec.step!r}, not {step!r}")
        return cls(spec, RunConfig.from_mapping(config, folder), device)


class StepServer:
    """Runs the steps of descriptions in this process; successive steps of the same run share model and data."""

    def __init__(self) -> None:
        self._last: tuple[RunConfig, str, str] | None = None
        self._worker: Worker | None = None

    def worker(self, description: Description) -> Worker:
        """A worker for a description: the last one if configuration and device are the same.

        Raises:
            StoreError: the store is in memory.
        """
        config, device = description.config, description.device
        run = (config, config.folder, device)
        if self._worker is None or self._last != run:
            reject_memory_store(config)
            self._worker, self._last = open_worker(config, device), run
        return self._worker

    def run(self, uri: str, step: str, emit: Callable[[Event], None]) -> Event:
        """Run the step of a description; returns the last event, which is not emitted.

        Args:
            uri: of the description.
            step: name of its step.
            emit: called with every event before the last.
        """
        try:
            description = Description.read(uri, step)
            outcome = execute(
                description.spec,
                self.worker(description),
                lambda done, total: emit({"event": "progress", "done": done, "total": total}),
            )
        except Exception as error:
            return error_event(error)
        return done_event(outcome)


def reject_memory_store(config: RunConfig) -> None:
    """Reject a store that other processes cannot access.

    Raises:
        StoreError: the store is ``memory://``.
    """
    if config.store.startswith("memory://"):
        raise StoreError(
            f"store {config.store} lives in one process; child processes, containers and clusters need a shared store, "
            "such as file:// or s3://"
        )


def done_event(outcome: Outcome) -> Event:
    """The last event of a successful step."""
    return {"event": "done", **outcome.ref.to_json(), "reused": outcome.reused, "seconds": outcome.seconds}


def error_event(error: Exception) -> Event:
    """The last event of a failed step; for a defect of the software, with its traceback."""
    known = isinstance(error, MlorqError)
    return {
        "event": "error",
        "kind": type(error).__name__ if known else None,
        "message": str(error) if known else "".join(traceback.format_exception(error)),
        "can_pass": is_transient(error),
    }


def outcome_of(event: Mapping[str, Any], label: str) -> Outcome:
    """The outcome in a last event; the error of an ``error`` event is raised.

    Args:
        event: ``done`` or ``error``.
        label: of the step, for the message of a defect.

    Raises:
        MlorqError: of the kind that the step raised; ``TransientError`` if a retry makes sense.
        RuntimeError: for a defect, with the traceback of the other process.
    """
    if event["event"] == "done":
        return Outcome(ArtifactRef.from_json(event), bool(event["reused"]), float(event["seconds"]))
    message = event["message"]
    if event["can_pass"]:
        raise TransientError(message)
    if event["kind"] is None:
        raise RuntimeError(f"{label} failed in its own process:\n{message}")
    raise KINDS.get(event["kind"], MlorqError)(message)
