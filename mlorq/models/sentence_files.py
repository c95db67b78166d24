"""Access to the files of a sentence encoder, in a folder or on the hub."""

from __future__ import annotations

import json
import os
from typing import Any

from mlorq.errors import ModelError, one_line
from mlorq.models.hub_names import load_problem


def find_file(location: str, file: str, name: str) -> str | None:
    """Local path of a file in a folder or on the hub; None if it does not exist.

    Args:
        location: folder or hub name.
        file: path of the file in it.
        name: name of the model, for messages.

    Raises:
        ModelError: the hub refuses the request.
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
            raise ModelError(f"model {name!r}: {load_problem(error, location)}") from error
    return path if path is not None and os.path.isfile(path) else None


def read_json(location: str, file: str, name: str) -> Any:
    """Content of a JSON file in a folder or on the hub; None if it does not exist. Arguments as in ``find_file``.

    Raises:
        ModelError: the file cannot be read or is not JSON.
    """
    path = find_file(location, file, name)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: {file} cannot be read: {one_line(error)}") from error
