"""The index of a finished search: all that further budgets need, found without loading the model or the data.

Keys of a search's steps are hashes of the model and of the calibration data, and computing them takes both. The index
is an artifact ``search/<key>`` whose key is the hash of the configuration that the search depends on. It holds the
specifications of the search's steps, the keys of model and data, and fingerprints of the files and the software that
they were made from (``mlorq.artifacts.fingerprints``). It counts only while all fingerprints are unchanged; else model
and data are loaded and all keys are computed, as in every other run, and the index is written again.

Unlike all other artifacts, an index can be overwritten. Nothing depends on it: without it, a run is only slower.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.layer_overrides import search_json
from mlorq.config.run import RunConfig
from mlorq.errors import StoreError
from steps.allocations import Search
from steps.base import StepSpec
from steps.made_from import is_unchanged
from steps.measuring import labels_digest
from steps.session import Known, Session

STEP, FILE = "search", "index.json"
VERSION = 1
# Of the ``search`` section: read by the integer program alone.
BY_BUDGET = ("objective", "solver", "time_limit", "gap")


def ref_of(config: RunConfig) -> ArtifactRef:
    """Reference of the index of a configuration's search."""
    search = {key: value for key, value in search_json(config.search).items() if key not in BY_BUDGET}
    activations = None if config.activations is None else config.activations.model_dump(mode="json")
    if activations is not None:
        activations.pop("compute", None)  # a constraint of the integer program
    read = {
        "version": VERSION,
        "model": config.model.model_dump(mode="json"),
        "calibration": config.data.calibration.model_dump(mode="json"),
        "search": search,
        "embeddings": None if config.embeddings is None else config.embeddings.model_dump(mode="json"),
        "activations": activations,
        "target": None if config.target is None else config.target.model_dump(mode="json"),
        "seed": config.seed,
        "folder": config.folder or os.getcwd(),
    }
    return ArtifactRef(STEP, digest_json(read))


def keep(session: Session, search: Search) -> None:
    """Write the index of a finished search, unless the store has one that counts.

    None is written for in-memory models or data, for files at a remote location, or in a store that cannot be written.
    """
    if session.made_from is None or session.known is not None:
        return
    index = {
        "model": session.model_ref.key,
        "calibration": session.calibration_ref.key,
        "labels": labels_digest(session),
        "rest_bytes": search.rest_bytes,
        "rest_memory": search.rest_memory,
        "made_from": session.made_from,
        "steps": [spec.to_json() for spec in search.specs],
    }
    ref, data = ref_of(session.config), json_bytes(index)
    stored = _stored(session, ref)
    # What the two were made from may list different files: a process opens some of them once.
    if stored is not None and stored | {"made_from": None} == json.loads(data) | {"made_from": None}:
        return
    artifacts = [spec.ref.to_json() for spec in search.specs]
    # The search itself has succeeded: in a store that can only be read, later runs load the model again.
    with contextlib.suppress(StoreError):
        session.store.write(ref.step, ref.key, {FILE: data}, details={"artifacts": artifacts})


def _stored(session: Session, ref: ArtifactRef) -> dict[str, Any] | None:
    """The index in the store; None if there is none, it is damaged, or a fingerprint has changed."""
    store = session.store
    try:
        index: dict[str, Any] = store.read_json(ref, FILE) if store.exists(ref) else {}
        return index if index and is_unchanged(index["made_from"], session.config, store) else None
    except (StoreError, KeyError, TypeError, AttributeError):
        return None


def load(session: Session) -> Search | None:
    """The search of a configuration from its index; None if there is none or a fingerprint has changed.

    If there is one, the session then has it, and the keys of model and data. The steps that it names may have been
    removed from the store since.
    """
    index = _stored(session, ref_of(session.config))
    if index is None:
        return None
    try:
        specs = [StepSpec.from_json(value) for value in index["steps"]]
        search = Search.of_specs(specs, index["model"], index["rest_bytes"], index["rest_memory"], session.artifacts)
        session.search, session.known = search, Known(index["model"], index["calibration"], index["labels"])
        return search
    except (StoreError, KeyError, TypeError, ValueError):
        # Written by another version, or its list of layers was removed: the full way reports what is missing.
        return None
