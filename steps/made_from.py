"""What the model and the calibration data of a run were made from: fingerprints of files and software."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mlorq.artifacts.fingerprints import code_of, fingerprints, paths_in, software, unchanged, user_code
from mlorq.artifacts.locations import is_remote
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.data.source import SOURCES
from mlorq.models.family import FAMILIES

PACKAGES = ("mlorq", "steps")
CODE = (*PACKAGES, "flows")


def made_from(config: RunConfig, store: Store, opened: Iterable[str]) -> dict[str, Any] | None:
    """Fingerprints of all that model and calibration data depend on, to be taken when both have just been loaded.

    Args:
        config: of the run.
        store: of the run; a local one is left out of the folders of data.
        opened: files that were opened while they were loaded.

    Returns:
        JSON values for ``is_unchanged``; None if a location is remote, a folder has too many files, or a module was
        changed after it was imported.
    """
    source = config.data.calibration
    places = [place for place in SOURCES[source.source].locations(source.own) if place is not None]
    named = [
        *FAMILIES[config.model.family].local_paths(config.model.own, config.folder),
        *(config.resolve(place) for place in places),
    ]
    if is_remote(config.folder) or any(is_remote(place) for place in named):
        return None
    paths = {place.partition("://")[2] or place for place in named}
    own = tuple(folder + os.sep for name in CODE if name in sys.modules for folder in sys.modules[name].__path__)
    paths |= {path for path in opened if not path.startswith(own)}  # ``code_of`` covers these
    code = user_code(CODE)
    files = None if code is None else fingerprints({*paths, *_arguments(config), *code}, _folder(store))
    return None if files is None else {"software": software(), "code": code_of(PACKAGES), "files": files}


def is_unchanged(known: Mapping[str, Any], config: RunConfig, store: Store) -> bool:
    """Whether everything is as it was when ``made_from`` gave ``known``.

    Raises:
        KeyError: ``known`` is malformed.
    """
    return (
        known["software"] == software()
        and known["code"] == code_of(PACKAGES)
        and _arguments(config) <= known["files"].keys()  # relative to the working directory, which may be another
        and unchanged(known["files"], _folder(store))
    )


def _arguments(config: RunConfig) -> set[str]:
    """The paths that arguments of the model's constructor may name."""
    return set(paths_in(getattr(config.model.own, "arguments", {}), config.folder))


def _folder(store: Store) -> str | None:
    return store.root if store.is_local else None
