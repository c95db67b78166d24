"""Whether the name of a model from transformers is that of a folder or of the hub, and errors of loading it."""

from __future__ import annotations

import os
import re

from mlorq.errors import one_line

_HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # NAME or OWNER/NAME


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of the hub: ``NAME`` or ``OWNER/NAME``.

    ``folder/``, ``./folder``, ``/folder``, ``~/folder`` and ``folder/folder/folder`` cannot. A name such as
    ``models/bert`` can be both, even if there is a folder ``models`` here: owners on the hub are called so as well.
    """
    return _HUB_NAME.fullmatch(name) is not None


def load_problem(error: Exception, location: str) -> str:
    """What to say of an error of transformers: its message, and that a hub name is not a folder either.

    Args:
        error: raised while something was loaded from ``location``.
        location: an absolute path, or a hub name.
    """
    if os.path.isabs(location) or not isinstance(error, OSError):
        return one_line(error)
    return f"there is no folder {location!r} here, and from the hub: {one_line(error)}"
