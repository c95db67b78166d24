"""The files beside a sentence encoder's transformer, in a folder or on the hub."""

from __future__ import annotations

import json
import os
from typing import Any

from mlorq.errors import ModelError


def find_file(location: str, file: str, name: str) -> str | None:
    """Path of a file of a folder or of the hub; None where there is none.

    Raises:
        ModelError: the hub refuses.
    """
    path: str | None = os.path.join(location, file)
    if not os.path.isdir(location):
        from transformers.utils import cached_file

        try:
            path = cached_file(
                location,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"model {name!r}: {' '.join(str(error).split())[:300]}") from error
    return path if path is not None and os.path.isfile(path) else None


def read_json(location: str, file: str, name: str) -> Any:
    """A JSON file of a folder or of the hub; None where there is none.

    Raises:
        ModelError: it cannot be read.
    """
    path = find_file(location, file, name)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: {file} cannot be read: {' '.join(str(error).split())}") from error
