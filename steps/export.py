"""Step ``export``: the checkpoint as files for other software, one artifact per entry of ``export``.

The files are those of ``mlorq export`` with the same options, below ``files/``, so that the folder holds nothing else.
They depend on the checkpoint alone: a model card has no metrics, which are measured later.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlorq.artifacts.hashing import digest_bytes, digest_json
from mlorq.artifacts.locations import resolve_location
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.errors import ConfigError
from mlorq.export_targets import TARGETS
from mlorq.export_targets.base import require
from mlorq.models.family import FAMILIES
from mlorq.scratch import scratch_folder
from steps.base import Needs, Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session

FILES, ABOUT = "files", "export.json"
SAMPLES = 4  # of the batch from which the inputs of user code are known
PREPARATION = (".json", ".txt", ".model", ".md", ".jinja")  # files of a model's folder that are not weights


@dataclass(frozen=True)
class Params:
    """The target, its options, and digests of the files in local folders that options name."""

    to: str
    options: dict[str, Any]
    read: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """The checkpoint; for user code also the float model, to load it into, and data that it takes."""

    checkpoint: ArtifactRef
    model: ModelRef | None = None
    calibration: DataRef | None = None


def specs(session: Session, checkpoint: ArtifactRef) -> list[StepSpec]:
    """One step per entry of ``export``; depends on the checkpoint, the options, and the folders that these name.

    Raises:
        ConfigError: a folder does not exist.
    """
    inputs = Inputs(checkpoint)
    if not FAMILIES[session.config.model.family].rebuilds:
        inputs = Inputs(checkpoint, session.model_ref, session.calibration_ref)
    params = _all_params(session)
    return [STEP.spec(each, inputs, label=each.to, needs=Needs(device=False)) for each in params]


def check(session: Session) -> None:
    """Check, before anything is computed, that targets have their packages here, and that named folders exist.

    Raises:
        ConfigError: something is missing.
    """
    engine = session.config.engine
    for params in _all_params(session):
        target = TARGETS[params.to]
        if engine.runner == "threads" and engine.steps != "docker":  # which have packages of their own
            require(f"export to {target.name}", target.packages, target.extra)


def _all_params(session: Session) -> list[Params]:
    found = []
    for entry in session.config.export:
        target, options, read = TARGETS[entry.to], entry.own.model_dump(mode="json"), {}
        for name in target.locations:
            if options[name] is None:
                continue
            path = resolve_location(options[name], session.config.folder)
            if os.path.isdir(path):
                options[name], read[name] = path, _digest(path)
            elif options[name].startswith((".", "/", "~")):
                raise ConfigError(f"export to {entry.to}: {name}: folder {path} does not exist")
        found.append(Params(entry.to, options, read))
    return found


def _digest(folder: str) -> str:
    """Digest of the files in a model's folder that are not weights."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file() and path.suffix in PREPARATION)
    return digest_json({path.name: digest_bytes(path.read_bytes()) for path in files})


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    from mlorq.models.batches import batch_samples, take_samples, unmarked

    target = TARGETS[params.to]
    require(f"export to {target.name}", target.packages, target.extra)
    settings = target.settings.model_validate(params.options)
    if inputs.model is not None and inputs.calibration is not None:
        from mlorq.models.copying import copy_module

        batch = next(iter(context.calibration(inputs.calibration).batches))
        example = unmarked(take_samples(batch, slice(0, min(SAMPLES, batch_samples(batch)))))
        settings = target.with_model(settings, copy_module(context.model(inputs.model).module).to("cpu"), example)
    with scratch_folder() as folder, context.artifacts.copied(inputs.checkpoint) as source:
        output = f"{folder}/model{target.suffixes[0]}" if target.suffixes else folder
        about = target.summary(target.write(source, output, settings))
        written = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
    described = {"to": params.to, "options": params.options, "about": about}
    return {**{f"{FILES}/{name}": data for name, data in written.items()}, ABOUT: json_bytes(described)}


STEP = Step("export", 2, Params, Inputs, run)
