"""Memory, disk space, and whether the store can be written."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from flows.doctor.row import Row
from mlorq.artifacts.store import Store
from mlorq.errors import MlorqError, hide_secrets
from mlorq.memory import machine_memory
from mlorq.numbers import byte_size

LEAST_DISK = 2 * 10**9  # of a run of a small model: artifacts, checkpoint, caches
LEAST_MEMORY = 2 * 10**9
STORE, DISK, MEMORY = "store", "disk", "memory"


def machine_rows(folder: Path | None) -> list[Row]:
    """Python, free memory, and the free space of the disk of a folder.

    Args:
        folder: of a local store; None: the store is remote, and the disk is that of the working directory.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    place = _existing(folder or Path.cwd())
    free = shutil.disk_usage(place).free
    enough = free >= LEAST_DISK
    disk = Row(
        DISK,
        "ok" if enough else "problem",
        f"{byte_size(free)} free at {place}",
        "" if enough else "free space: mlorq store gc removes artifacts that no kept run needs",
    )
    return [Row("Python", "ok", python), _memory_row(), disk]


def _memory_row() -> Row:
    total, free = machine_memory()
    state, advice = ("ok", "") if free >= LEAST_MEMORY else ("problem", "end other programs, or use a smaller model")
    return Row(MEMORY, state, f"{byte_size(free)} of {byte_size(total)} free", advice)  # type: ignore[arg-type]


def store_rows(store: Store, folder: Path | None) -> list[Row]:
    """Whether the store can be written; a folder that does not exist is not created.

    Args:
        store: the store.
        folder: of a local store; None: it is remote.
    """
    shown = hide_secrets(store.url)
    if folder is not None and not folder.exists():
        parent = _existing(folder)
        if os.access(parent, os.W_OK | os.X_OK) and parent.is_dir():
            return [Row(STORE, "ok", f"{shown}: will be created")]
        return [Row(STORE, "problem", f"{shown}: {parent} cannot be written", "choose another folder (key store)")]
    try:
        store.check_writable()
    except MlorqError as error:
        return [Row(STORE, "problem", str(error), "see docs/STORES.md for the credentials of object stores")]
    return [Row(STORE, "ok", f"{shown}: writable")]


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(one for one in (path, *path.parents) if one.exists())
