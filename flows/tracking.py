"""Log finished runs to experiment trackers: MLflow, and Weights & Biases where it is installed.

A tracker gets the configuration as parameters, the numbers of the result as metrics, the allocation, the page and the
checkpoint. A run is logged once: the same run again finds its entry. The result is in the store by then, so that a
tracker that fails costs a warning and not the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlorq
from flows.page import PAGE, page_ref
from mlorq.artifacts.locations import resolve_location
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.run import RunConfig
from mlorq.config.tracking import FOLDER, MlflowConfig, WandbConfig
from mlorq.errors import ConfigError, hide_secrets, one_line
from mlorq.extras import install_command
from mlorq.scratch import scratch_folder
from steps.session import Session

LONGEST_VALUE, LONGEST_KEY = 500, 250  # characters of parameters; trackers bound them
BATCH = 100  # parameters per request, MLflow's limit
NUMBERS = ("nmse", "predicted_cost", "bytes", "file_bytes", "float_bytes", "rest_bytes", "budget_bytes")


@dataclass(frozen=True)
class Tracked:
    """A finished run for a tracker.

    Attributes:
        name: of the run, unique to its result.
        folder: that relative paths start from.
        parameters: the configuration by dotted key.
        metrics: numbers of the result.
        allocation: one row per layer.
        files: contents of further files by name: ``run.json``, ``allocation.json``, and the page if there is one.
        checkpoint: reads the checkpoint's files, by name.
    """

    name: str
    folder: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]
    allocation: list[dict[str, Any]]
    files: Mapping[str, bytes]
    checkpoint: Callable[[], Mapping[str, bytes]]


def check(config: RunConfig) -> None:
    """Refuse trackers whose package is missing, before anything is computed.

    Raises:
        ConfigError: one is missing.
    """
    for name, advice in (("mlflow", install_command("mlflow")), ("wandb", "pip install wandb")):
        if config.tracking is not None and getattr(config.tracking, name) is not None and not _is_installed(name):
            raise ConfigError(f"tracking.{name}: the package {name} is not installed: {advice}")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a spec, as stand-ins have
        return True


def track(session: Session, result: Mapping[str, Any], summary: ArtifactRef, log: Any) -> dict[str, str]:
    """Log a finished run to the configured trackers.

    Args:
        session: of the run.
        result: its public result object.
        summary: its summary.
        log: a logger.

    Returns:
        ``{tracker: location of the run there}``, without those that failed.
    """
    chosen = session.config.tracking
    if chosen is None:
        return {}
    senders: dict[str, Callable[[Tracked], str]] = {}
    if chosen.mlflow is not None:
        senders["mlflow"] = partial(to_mlflow, chosen.mlflow)
    if chosen.wandb is not None:
        senders["wandb"] = partial(to_wandb, chosen.wandb)
    found = {}
    for name, send in senders.items():
        try:
            found[name] = send(tracked(session, result, summary))
            log.info("%s: logged to %s: %s", result["run"], name, found[name])
        except Exception as error:  # of any type, from any of the libraries behind a tracker
            log.warning("%s is not logged to %s: %s: %s", result["run"], name, type(error).__name__, one_line(error))
    return found


def tracked(session: Session, result: Mapping[str, Any], summary: ArtifactRef) -> Tracked:
    """A finished run for trackers.

    Args:
        session: of the run.
        result: its public result object.
        summary: its summary.
    """
    config, store = session.config, session.store
    values = config.model_dump(mode="json", exclude={"tracking"}) | {"budget": result["budget"]}
    page = page_ref(summary)
    files = {"run.json": json_bytes(dict(result)), "allocation.json": json_bytes(result["allocation"])}
    files |= {PAGE: store.read_bytes(page, PAGE)} if store.exists(page) else {}
    checkpoint = ArtifactRef.from_json(result["artifacts"]["checkpoint"])
    return Tracked(
        result["run"],
        config.folder or os.getcwd(),
        {"mlorq": mlorq.__version__, **dict(parameters(values))},
        metrics_of(result),
        [dict(row) for row in result["allocation"]],
        files,
        lambda: session.artifacts.files(checkpoint),
    )


def parameters(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The values of a configuration as texts by dotted key; lists are one text, nulls are left out."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from parameters(item, f"{key}.{name}" if key else str(name))
    elif value is not None:
        text = value if isinstance(value, str) else json.dumps(value)
        yield "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)[:LONGEST_KEY], text[:LONGEST_VALUE]


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a result by name."""
    found = {name: result.get(name) for name in NUMBERS}
    found["times_smaller"] = result["float_bytes"] / max(1, result["bytes"])
    for kind, values in result["metrics"].items():
        found |= {f"{kind}.{name}": value for name, value in values.items()}
    found |= {f"seconds.{step}": seconds for step, seconds in result["seconds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


# -- MLflow ---------------------------------------------------------------------------------------------------------


def to_mlflow(settings: MlflowConfig, run: Tracked) -> str:
    """Log a run to MLflow; returns its location there.

    Args:
        settings: of the configuration.
        run: the run.
    """
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # each table that is made
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    uri, artifacts = mlflow_place(settings, run.folder)
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(settings.experiment)
    experiment = client.create_experiment(settings.experiment, artifacts) if known is None else known.experiment_id
    # An entry of a run that was interrupted while it was logged does not count.
    done = client.search_runs([experiment], f"tags.`mlorq.run` = '{run.name}' and attributes.status = 'FINISHED'")
    if done:
        entry = done[0].info.run_id
    else:
        entry = client.create_run(experiment, run_name=run.name, tags={"mlorq.run": run.name}).info.run_id
        try:
            _fill(client, entry, settings, run)
        except BaseException:
            client.set_terminated(entry, "FAILED")
            raise
        client.set_terminated(entry)
    return f"{hide_secrets(uri)} experiment {settings.experiment!r} run {entry}"


def _fill(client: Any, entry: str, settings: MlflowConfig, run: Tracked) -> None:
    from mlflow.entities import Metric, Param

    pairs = [Param(key, value) for key, value in run.parameters.items()]
    for start in range(0, len(pairs), BATCH):
        client.log_batch(entry, params=pairs[start : start + BATCH])
    client.log_batch(entry, metrics=[Metric(key, value, 0, 0) for key, value in run.metrics.items()])
    with scratch_folder() as name:
        _write(run.files, Path(name))
        client.log_artifacts(entry, name)
    if settings.checkpoint:
        with scratch_folder() as name:
            _write(run.checkpoint(), Path(name))
            client.log_artifacts(entry, name, "checkpoint")


def mlflow_place(settings: MlflowConfig, folder: str) -> tuple[str, str | None]:
    """Tracking URI, and location of the files of a new experiment; None: the server decides.

    MLflow's own layout of folders is no longer maintained: a local folder has a database and the files.

    Args:
        settings: of the configuration.
        folder: that relative paths start from.
    """
    given = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or FOLDER
    if "://" in given or given.startswith(("databricks", "file:")):
        return given, None
    place = Path(resolve_location(given, folder))
    place.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{place / 'mlflow.db'}", (place / "artifacts" / settings.experiment).as_uri()


# -- Weights & Biases -----------------------------------------------------------------------------------------------


def to_wandb(settings: WandbConfig, run: Tracked) -> str:
    """Log a run to Weights & Biases; returns its location there. The same run again updates its entry.

    Args:
        settings: of the configuration.
        run: the run.
    """
    wandb = importlib.import_module("wandb")
    entry = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=run.name,
        id="".join(c if c.isalnum() or c in "-_" else "-" for c in run.name)[:LONGEST_ID],
        resume="allow",
        mode=settings.mode,
        dir=run.folder,
        config=dict(run.parameters),
    )
    try:
        entry.summary.update(dict(run.metrics))
        columns = list(run.allocation[0])
        rows = [[row[name] for name in columns] for row in run.allocation]
        shown = {"allocation": wandb.Table(columns=columns, data=rows)}
        if PAGE in run.files:
            shown["report"] = wandb.Html(run.files[PAGE].decode(), inject=False)
        entry.log(shown)
        if settings.checkpoint:
            with scratch_folder() as name:
                _write(run.checkpoint(), Path(name))
                model = wandb.Artifact("checkpoint", type="model", metadata=dict(run.metrics))
                model.add_dir(name)
                entry.log_artifact(model)
                # Before the folder is gone; an artifact of an offline run has been copied when it is logged.
                if settings.mode == "online":
                    model.wait()
    except BaseException:
        entry.finish(exit_code=1)
        raise
    entry.finish()
    return str(entry.dir if settings.mode == "offline" else entry.url)


LONGEST_ID = 128


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
