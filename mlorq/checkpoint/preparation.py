"""Files of the tokenizer or image processor in a checkpoint: folder ``preparation``, with digests in ``mlorq.json``.

A checkpoint carries copies and not the place where the float model came from: it is complete on every machine, and
nothing that it names has to be looked up. Only files with names in ``ALLOWED`` are written or read, as bytes that are
compared with their digests. ``mlorq.load`` does not need them; exporters copy them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from mlorq.checkpoint import places
from mlorq.checkpoint.places import DESCRIPTION, Location
from mlorq.checkpoint.tensor_file import digest
from mlorq.errors import CheckpointError
from mlorq.models.preparation import GENERATION, PREPARATION, SENTENCE_SETTINGS

FOLDER = KEY = "preparation"
ALLOWED = frozenset((*PREPARATION, *SENTENCE_SETTINGS, *GENERATION))
MOST_BYTES = 10**8  # of a file; the largest tokenizers have about a third of it


def described(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """The object ``preparation`` of ``mlorq.json``: bytes and digest of each file, by name."""
    return {name: {"bytes": len(files[name]), "digest": digest(files[name])} for name in sorted(files)}


def check(table: Mapping[str, Any]) -> None:
    """Check that every entry of the object ``preparation`` has bytes and a digest.

    Raises:
        ValueError: one has not.
    """
    for name, about in table.items():
        if not isinstance(about, dict) or not isinstance(about.get("digest"), str):
            raise ValueError(f"{KEY}.{name:.60} must have bytes and a digest")
        if type(about.get("bytes")) is not int or about["bytes"] < 0:
            raise ValueError(f"{KEY}.{name:.60} must have bytes and a digest")


def placed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files by their places in the checkpoint."""
    return {f"{FOLDER}/{name}": data for name, data in files.items()}


def read_preparation(location: Location, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the tokenizer or image processor by name; empty if the checkpoint has none.

    It has none, too, if the folder was not copied with the two files of the model.

    Args:
        location: folder or fsspec URL of the checkpoint.
        config: the contents of its ``mlorq.json``, as ``inspect`` gives them.

    Raises:
        CheckpointError: a file is missing, too large or changed, or ``mlorq.json`` names one that is not allowed.
    """
    table = config.get(KEY) or {}
    try:
        for name in table:
            if name not in ALLOWED:
                raise CheckpointError(
                    f"{DESCRIPTION} names {name!r:.60}, which is not a file of a tokenizer or image processor"
                )
        fs, root = places.file_system(location)
        with places.reading(FOLDER):
            if not table or not fs.exists(posixpath.join(root, FOLDER)):
                return {}
        return {name: _read(location, name, about) for name, about in table.items()}
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {location}: {error}") from error


def _read(location: Location, name: str, about: Mapping[str, Any]) -> bytes:
    path = posixpath.join(FOLDER, name)
    with places.opened(location, path, whole=False) as (file, size), places.reading(path):
        # Compared before it is read: whoever made the folder chose what lies there.
        data = file.read() if size == about["bytes"] <= MOST_BYTES else b""
    if len(data) != about["bytes"] or digest(data) != about["digest"]:
        raise CheckpointError(f"{path} does not have its size and digest in {DESCRIPTION}")
    return data
