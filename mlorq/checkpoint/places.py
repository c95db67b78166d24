"""Folders and fsspec URLs of checkpoints: the names of their files, which are opened and read here."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mlorq.artifacts.transfer import os_errors
from mlorq.errors import CheckpointError, one_line
from mlorq.scratch import scratch_folder

TENSORS = "model.safetensors"
DESCRIPTION = "mlorq.json"
FILES = (TENSORS, DESCRIPTION)
OLD_DESCRIPTION = "config.json"  # of format 1; also the name that Hugging Face gives its own
ABSENT = (FileNotFoundError, NotADirectoryError)
Location = str | os.PathLike[str]


def file_system(location: Location) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location, and the path in it.

    Raises:
        CheckpointError: the protocol is unknown, or its driver is not installed or refuses.
    """
    try:
        with os_errors():
            fs, root = url_to_fs(os.fspath(location))
        return fs, str(root)
    except (OSError, ImportError) as error:
        raise CheckpointError(one_line(error)) from error


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn faults of drivers into one line that names the file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with os_errors():
            yield
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {one_line(error)}") from error


def read(location: Location, name: str) -> bytes | None:
    """The bytes of a small file; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    fs, root = file_system(location)
    try:
        with reading(name):
            return bytes(fs.cat_file(posixpath.join(root, name)))
    except CheckpointError as error:
        if isinstance(error.__cause__, ABSENT):
            return None
        raise


@contextmanager
def opened(location: Location, name: str, *, whole: bool) -> Iterator[tuple[IO[bytes], int]]:
    """An open file, and its size in bytes. Its reads belong into ``reading``.

    Args:
        location: folder or URL.
        name: of the file in it.
        whole: whether all of it will be read; it is then copied to a temporary file first if it is on a network.

    Raises:
        CheckpointError: the file is missing or cannot be opened.
    """
    with ExitStack() as stack:
        try:
            with reading(name):
                file, size = stack.enter_context(_file(location, name, whole))
        except CheckpointError as error:
            if isinstance(error.__cause__, ABSENT):
                raise CheckpointError(missing(location, name)) from error
            raise
        yield file, size


@contextmanager
def _file(location: Location, name: str, whole: bool) -> Iterator[tuple[IO[bytes], int]]:
    fs, root = file_system(location)
    path = posixpath.join(root, name)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:  # Python's own files read straight into a tensor's memory
            yield file, os.fstat(file.fileno()).st_size
    elif isinstance(fs, MemoryFileSystem) or not whole:
        with fs.open(path, "rb") as file:
            yield file, int(fs.size(path))
    else:
        with scratch_folder() as folder:
            fs.get_file(path, os.path.join(folder, TENSORS))
            with _file(folder, TENSORS, whole) as found:
                yield found


def missing(location: Location, name: str) -> str:
    """What to say of a file that is not there."""
    fs, root = file_system(location)
    with reading(name):
        return f"the folder has no {name}" if fs.isdir(root) else "the folder does not exist"
