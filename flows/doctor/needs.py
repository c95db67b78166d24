"""What a configuration needs: devices, extras, services, and files."""

from __future__ import annotations

import os
from collections.abc import Iterator

from flows.doctor.machine import STORE
from flows.doctor.row import Row
from flows.doctor.services import DASK, DOCKER, PREFECT
from mlorq.config.run import RunConfig
from mlorq.data.source import SOURCES, Role
from mlorq.errors import MlorqError
from mlorq.export_targets import TARGETS
from mlorq.models.family import FAMILIES
from mlorq.runtimes import RUNTIMES

ROLES: tuple[Role, ...] = ("calibration", "evaluation")


def needs_of(config: RunConfig) -> dict[str, str]:
    """What needs something, by the name of the row that shows whether it is there."""
    found = dict.fromkeys(("packages", "torch", STORE, PREFECT), "every run")
    if config.engine.runner == "dask":
        found |= {DASK: "engine.runner", "extra dask": "engine.runner"}
    if config.engine.runner == "ray":
        found["extra ray"] = "engine.runner"
    if config.engine.steps == "docker":
        found |= {DOCKER: "engine.steps", "extra docker": "engine.steps"}
    for entry in config.export:
        if extra := TARGETS[entry.to].extra:
            found[f"extra {extra}"] = f"export to {entry.to}"
    if config.target is not None and (extra := RUNTIMES[config.target.runtime].extra):
        found[f"extra {extra}"] = f"target {config.target.runtime}"
    if config.tracking is not None and config.tracking.mlflow is not None:
        found["extra mlflow"] = "tracking.mlflow"
    for role in ROLES:
        section = getattr(config.data, role)
        package = SOURCES[section.source].requires(section.own, role)
        if package is not None:
            found[f"extra {package.extra}"] = f"data.{role}"
    if config.resolve(config.store).startswith("s3://"):
        found["extra s3"] = "store"
    for name in _devices(config):
        found[f"device {name}"] = "engine.devices"
    return found


def _devices(config: RunConfig) -> list[str]:
    """Devices that the configuration names; with a cluster, they are those of its workers."""
    wanted = config.engine.devices
    if wanted == "auto" or config.engine.runner != "threads":
        return []
    return [wanted] if isinstance(wanted, str) else list(wanted)


def absent_rows(rows: list[Row], needs: dict[str, str]) -> list[Row]:
    """Rows for devices that are needed and were not found; ``cuda`` stands for all GPUs."""
    names = {row.name for row in rows}
    if "device cuda:0" in names:
        names.add("device cuda")
    absent = [name for name in needs if name.startswith("device ") and name not in names]
    return [Row(name, "missing", "torch does not find it", "correct engine.devices") for name in absent]


def file_rows(config: RunConfig) -> list[Row]:
    """A row for all local files that the configuration names, or one for each that does not exist."""
    rows = []
    count = 0
    for key, paths in _files(config):
        try:
            for path in paths:
                count += 1
                if "://" not in path and not os.path.exists(path):
                    rows.append(Row("files", "missing", f"{key}: {path} does not exist", "correct the path", key))
        except MlorqError as error:
            rows.append(Row("files", "missing", str(error), "correct the name or the path", key))
    return rows or [Row("files", "ok", f"{count} files and folders are there", needed_by="the configuration")]


def _files(config: RunConfig) -> Iterator[tuple[str, Iterator[str]]]:
    model = config.model
    yield "model", (path for path in FAMILIES[model.family].local_paths(model.own, config.folder))
    for role in ROLES:
        section = getattr(config.data, role)
        named = SOURCES[section.source].locations(section.own)
        yield f"data.{role}", (config.resolve(path).removeprefix("file://") for path in named if path is not None)
