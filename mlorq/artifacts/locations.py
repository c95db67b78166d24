"""Resolution of the paths and fsspec URLs in a configuration to absolute ones."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable

from mlorq.errors import ConfigError, hide_secrets

# Functions that return the URL of a named store, by the prefix of such names: ``flows`` adds the blocks of Prefect.
LOOKUPS: dict[str, Callable[[str], str]] = {}
BLOCK = "block"


def url_of_store(location: str) -> str:
    """The URL of a store that is named, as ``block:TYPE/NAME``; other locations are returned unchanged.

    Raises:
        ConfigError: there is no such name, or names are unknown here.
    """
    prefix, _, name = location.partition(":")
    if prefix in LOOKUPS:
        return LOOKUPS[prefix](name)
    if prefix == BLOCK:
        raise ConfigError(f"store: {location} is a block of Prefect, which flows and commands read: give a URL here")
    return location


def resolve_location(location: str, folder: str) -> str:
    """The absolute path or URL of a location; absolute URLs are returned unchanged.

    Args:
        location: a path or URL from a configuration; relative paths and ``file://./…`` URLs start from ``folder``.
        folder: a local folder (empty: the working directory) or a URL, as ``s3://bucket/runs``. If it is a remote URL,
            relative ``file://`` URLs start from the working directory.

    Raises:
        ConfigError: a relative path leaves the bucket or host of a URL.
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
    """Whether a folder is a URL that is not a local one (``file://``, ``local://``)."""
    scheme, separator, _ = os.fspath(folder).partition("://")
    return bool(separator) and scheme not in ("file", "local")


def absolute_folder(folder: str) -> str:
    """A folder as an absolute path, or an unchanged URL; an empty one is the working directory."""
    return folder if is_remote(folder) else os.path.abspath(folder or ".")


def folder_of_url(url: str) -> str:
    """URL of the folder that contains a file.

    Raises:
        ConfigError: the URL is chained, as in ``zip://…::s3://…``.
    """
    scheme, _, rest = url.partition("://")
    if "::" in rest:  # the neighbours of the file are in an archive
        raise ConfigError(f"configuration {hide_secrets(url)} is behind a chained URL: give the URL of a plain file")
    if scheme in ("http", "https"):
        rest = rest.partition("?")[0].partition("#")[0]  # a signature is of the file alone
    return f"{scheme}://{posixpath.dirname(rest)}"


def _below(folder: str, path: str) -> str:
    scheme, _, rest = folder.partition("://")
    joined = posixpath.normpath(posixpath.join(rest, path))
    root = rest.partition("/")[0]
    if joined.partition("/")[0] in ("", ".", "..") or (root and joined.partition("/")[0] != root):
        raise ConfigError(f"path {path!r} leads out of {hide_secrets(folder)}: give a path inside it, or a full URL")
    return f"{scheme}://{joined}"
