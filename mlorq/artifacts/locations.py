"""Where things are: paths and fsspec URLs as a configuration names them, made absolute."""

from __future__ import annotations

import os
import posixpath

from mlorq.artifacts.transfer import hide_password
from mlorq.errors import ConfigError


def resolve_location(location: str, folder: str) -> str:
    """Make a relative path, or a relative ``file://./…`` URL, absolute against ``folder``; URIs stay as they are.

    Args:
        location: as a configuration names it.
        folder: a folder of this machine (empty: the working directory) or a URL, as ``s3://bucket/runs``. A relative
            ``file://`` URL means this machine: where the folder is a URL it starts from the working directory.

    Raises:
        ConfigError: a relative path leads out of the bucket or host of a URL.
    """
    scheme, separator, rest = location.partition("://")
    here = os.getcwd() if not folder or is_remote(folder) else folder
    if not separator:
        path = os.path.expanduser(location)
        if os.path.isabs(path):
            return path
        return _below(folder, path) if is_remote(folder) else os.path.normpath(os.path.join(here, path))
    if scheme in ("file", "local") and not posixpath.isabs(rest):
        return f"file://{os.path.normpath(os.path.join(here, rest))}"
    return location


def is_remote(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a URL of something other than this machine's files."""
    scheme, separator, _ = os.fspath(folder).partition("://")
    return bool(separator) and scheme not in ("file", "local")


def absolute_folder(folder: str) -> str:
    """A folder that means the same in every process: a URL as it is, a path from the root; empty: the working one."""
    return folder if is_remote(folder) else os.path.abspath(folder or ".")


def folder_of_url(url: str) -> str:
    """The folder of a file behind a URL.

    Raises:
        ConfigError: the URL is a chain, as in ``zip://…::s3://…``.
    """
    scheme, _, rest = url.partition("://")
    if "::" in rest:  # what is beside the file is in an archive
        raise ConfigError(f"configuration {hide_password(url)}: give the URL of a plain file")
    return f"{scheme}://{posixpath.dirname(rest)}"


def _below(folder: str, path: str) -> str:
    scheme, _, rest = folder.partition("://")
    joined = posixpath.normpath(posixpath.join(rest, path))
    root = rest.partition("/")[0]
    if joined.partition("/")[0] in ("", ".", "..") or (root and joined.partition("/")[0] != root):
        raise ConfigError(f"path {path!r} leads out of {hide_password(folder)}")
    return f"{scheme}://{joined}"
