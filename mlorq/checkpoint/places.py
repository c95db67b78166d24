"""Folders and fsspec URLs of checkpoints: the names of their files, which are opened and read here."""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mlorq.artifacts.transfer import as_os_error
from mlorq.errors import CheckpointError, one_line

TENSORS = "model.safetensors"
DESCRIPTION = "mlorq.json"
FILES = (TENSORS, DESCRIPTION)
OLD_DESCRIPTION = "config.json"  # of format 1; also the name that Hugging Face gives its own
Location = str | os.PathLike[str]


def file_system(location: Location) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location, and the path in it.

    Raises:
        CheckpointError: the protocol is unknown or its driver is not installed.
    """
    try:
        fs, root = url_to_fs(os.fspath(location))
        return fs, str(root)
    except (ValueError, ImportError) as error:
        raise CheckpointError(str(error)) from error


def read(location: Location, name: str) -> bytes | None:
    """The bytes of a small file; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    fs, root = file_system(location)
    try:
        return bytes(fs.cat_file(posixpath.join(root, name)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # drivers have exceptions of their own
        fault = as_os_error(error)
        if fault is None:
            raise
        raise CheckpointError(f"{name} cannot be read: {one_line(fault)}") from error


@contextmanager
def opened(location: Location, name: str, *, whole: bool) -> Iterator[tuple[IO[bytes], int]]:
    """An open file, and its size in bytes.

    Args:
        location: folder or URL.
        name: of the file in it.
        whole: whether all of it will be read; it is then copied to a temporary file first if it is on a network.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    fs, root = file_system(location)
    path = posixpath.join(root, name)
    near = isinstance(fs, (LocalFileSystem, MemoryFileSystem))
    try:
        with tempfile.TemporaryDirectory(prefix="mlorq-load-") if whole and not near else _nothing() as folder:
            if folder is not None:
                fs.get_file(path, os.path.join(folder, name))
                path, fs = os.path.join(folder, name), LocalFileSystem()
            # Python's own files read straight into a tensor's memory.
            with open(path, "rb") if isinstance(fs, LocalFileSystem) else fs.open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size if isinstance(fs, LocalFileSystem) else int(fs.size(path))
                yield file, size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(missing(location, name)) from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error


def missing(location: Location, name: str) -> str:
    """What to say of a file that is not there."""
    fs, root = file_system(location)
    return f"the folder has no {name}" if fs.isdir(root) else "the folder does not exist"


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
