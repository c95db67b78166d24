"""The index of a finished search: all that further budgets need, found without loading the model or the data.

Keys of a search's steps are hashes of the model and of the calibration data, and computing them takes both. The index
is an artifact ``search/<key>`` whose key is the hash of the configuration that the search depends on. It holds the
specifications of the search's steps, the keys of model and data, and fingerprints of the files and the software that
they were made from (``mlorq.artifacts.fingerprints``). It counts only while all fingerprints are unchanged; else model
and data are loaded and all keys are computed, as in every other run, and the index is written again.

Unlike all other artifacts, an index can be overwritten. Nothing depends on it: without it, a run is only slower.
"""

from __future__ import annotations

import os

from mlorq.artifacts.fingerprints import code_of, fingerprints, paths_in, software, unchanged, user_code
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.locations import is_remote
from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.layer_overrides import search_json
from mlorq.config.run import RunConfig
from mlorq.data.source import SOURCES
from mlorq.errors import MlorqError, StoreError
from mlorq.models.family import FAMILIES
from steps.allocations import Search
from steps.base import StepSpec
from steps.measuring import labels_digest
from steps.session import Known, Session

STEP, FILE = "search", "index.json"
VERSION = 1
PACKAGES = ("mlorq", "steps")
# Of the ``search`` section: read by the integer program and by the refinement alone.
BY_BUDGET = ("objective", "solver", "time_limit", "gap", "rounds")


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
        "seed": config.seed,
        "folder": config.folder or os.getcwd(),
    }
    return ArtifactRef(STEP, digest_json(read))


def keep(session: Session, search: Search) -> None:
    """Write the index of a finished search, unless it is in the store as it is.

    None is written for in-memory models or data, for data at a remote location, or in a store that cannot be written.
    """
    config = session.config
    if session.in_memory or session.known is not None:
        return
    files = _files(session)
    if files is None:
        return
    index = {
        "model": session.model_ref.key,
        "calibration": session.calibration_ref.key,
        "labels": labels_digest(session),
        "rest_bytes": search.rest_bytes,
        "software": software(),
        "code": code_of(PACKAGES),
        "files": files,
        "steps": [spec.to_json() for spec in search.specs],
    }
    ref, data = ref_of(config), json_bytes(index)
    try:
        if not session.store.exists(ref) or session.store.read_bytes(ref, FILE) != data:
            artifacts = [spec.ref.to_json() for spec in search.specs]
            session.store.write(ref.step, ref.key, {FILE: data}, details={"artifacts": artifacts})
    except StoreError:
        # The search itself succeeded; in a store that can only be read, later runs load the model again.
        return


def load(session: Session) -> Search | None:
    """The search of a configuration from its index; None if there is none or a fingerprint has changed.

    If there is one, the session then knows the keys of model and data.

    Only the index is read: the steps that it names may have been removed from the store since.
    """
    store, ref = session.store, ref_of(session.config)
    try:
        if not store.exists(ref):
            return None
        index = store.read_json(ref, FILE)
        same = (
            index["software"] == software()
            and index["code"] == code_of(PACKAGES)
            and unchanged(index["files"], _store_folder(session))
        )
        if not same:
            return None
        specs = [StepSpec.from_json(value) for value in index["steps"]]
        search = Search.of_specs(specs, index["model"], index["rest_bytes"], session.artifacts)
        session.known = Known(index["model"], index["calibration"], index["labels"])
        return search
    except (MlorqError, KeyError, TypeError, ValueError):
        # Damaged, replaced while it was read, or its layers were removed: the full way reports what is missing.
        return None


def _files(session: Session) -> dict[str, str] | None:
    """Fingerprints of all files that model and calibration data were made from; None if one cannot have any."""
    config = session.config
    family, source = FAMILIES[config.model.family], config.data.calibration
    places = [place for place in SOURCES[source.source].locations(source.own) if place is not None]
    named = [*family.local_paths(config.model.own, config.folder), *map(config.resolve, places)]
    if is_remote(config.folder) or any(map(is_remote, named)):
        return None
    paths = {place.partition("://")[2] or place for place in named}
    paths |= set(paths_in(getattr(config.model.own, "arguments", {}), config.folder))
    return fingerprints(paths | session.opened | set(user_code({*PACKAGES, "flows"})), _store_folder(session))


def _store_folder(session: Session) -> str | None:
    return session.store.root if session.store.is_local else None
