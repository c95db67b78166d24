"""Contents of data files; a file at fault is one line that names it."""

from __future__ import annotations

from typing import Any

from mlorq.artifacts.transfer import can_pass, os_errors
from mlorq.errors import DataError, one_line

NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def contents(fs: Any, path: str, name: str, missing: str = "does not exist") -> bytes:
    """The bytes of a file.

    Args:
        fs: its file system.
        path: its path there.
        name: its name, for errors.
        missing: what the error says of a file that does not exist.

    Raises:
        DataError: the file does not exist or cannot be read.
        OSError: a transient fault of a network; a step that meets one is tried again.
    """
    try:
        with os_errors():
            data: bytes = fs.cat_file(path)
    except NO_FILE:
        raise DataError(f"{name} {missing}") from None
    except OSError as error:
        if can_pass(error):
            raise
        raise DataError(f"{name} cannot be read: {one_line(error)}") from error
    return data


def text_of(data: bytes, name: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} cannot be read, it is not UTF-8: {error}") from error
