"""The result of the run that made a checkpoint, as far as it can be found."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from fsspec.core import url_to_fs

from mlorq.artifacts.transfer import os_errors
from mlorq.errors import ConfigError
from mlorq.forms.base import FIELDS

STEP, FILE = "summary", "run.json"


def find_result(checkpoint: str, budget: str | None) -> dict[str, Any]:
    """The result of the run whose store a checkpoint is in; empty if the checkpoint is in no store.

    Args:
        checkpoint: folder or fsspec URL of a compressed model.
        budget: the budget that the checkpoint records. Runs at several budgets can have the same checkpoint.
    """
    try:
        with os_errors():
            fs, root = url_to_fs(checkpoint)
            store, key = posixpath.dirname(posixpath.dirname(root.rstrip("/"))), posixpath.basename(root.rstrip("/"))
            results = [json.loads(fs.cat_file(path)) for path in sorted(fs.glob(f"{store}/{STEP}/*/{FILE}"))]
        own = [result for result in results if result["artifacts"]["checkpoint"]["key"] == key]
        own.sort(key=lambda result: result.get("budget") != budget)
    except (OSError, ImportError, KeyError, TypeError):
        return {}  # what is beside the folder is of other software, or damaged
    return dict(own[0]) if own else {}


def read_result(path: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's result object from a JSON file.

    Args:
        path: the file, with the output of ``mlorq compress --json`` or a ``run.json``.
        layers: the layers that the checkpoint records, by which its result is recognised.

    Raises:
        ConfigError: the file cannot be read, or has results of other checkpoints only.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"result {path} cannot be read: {error}") from error
    results = found.get("results", [found]) if isinstance(found, dict) else found
    wanted = _allocation(layers)
    for result in results if isinstance(results, list) else ():
        # A checkpoint also lists embedding tables, which are not layers of the search.
        own = _allocation(result.get("allocation") or ()) if isinstance(result, dict) else set()
        if own and own <= wanted:
            return dict(result)
    raise ConfigError(f"result {path} has no result with the checkpoint's allocation")


def _allocation(rows: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(row.get(key) for key in ("layer", *FIELDS, "bytes")) for row in rows}
