"""Files of exported graphs, with a tokenizer's files beside them."""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.registry import Settings


class GraphConfig(Settings):
    """Options of targets that write graphs."""

    tokenizer: str | None = Field(
        None, description="folder, folder inside a package, or hub name of the tokenizer to write beside the file"
    )
    part: str = Field("", description="submodule to export; default: what the family can export")


def write_beside(output: str, files: Mapping[str, bytes], tokenizer: str | None, target: str) -> list[str]:
    """Write files and, beside the output, those of a tokenizer.

    Args:
        output: path or fsspec URL of the main file.
        files: contents by location.
        tokenizer: folder, folder inside a package, or hub name of a tokenizer.
        target: name of the export target, for errors.

    Returns:
        Locations of the written files.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
        CheckpointError: a file cannot be written.
    """
    from mlorq.artifacts.store import put_file

    source = _tokenizer_files(tokenizer, target) if tokenizer is not None else {}
    folder = posixpath.dirname(output)
    files = {**files, **{posixpath.join(folder, name): data for name, data in source.items()}}
    try:
        for location, data in files.items():
            fs, path = url_to_fs(location)
            fs.makedirs(posixpath.dirname(path) or ".", exist_ok=True)
            put_file(fs, path, data)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error
    return list(files)


def _tokenizer_files(name: str, target: str) -> dict[str, bytes]:
    """The files of a tokenizer by name."""
    from mlorq.models.transformers import TransformersSettings, tokenizer

    try:
        found = tokenizer(TransformersSettings(name=name, task="sentence-similarity"))
    except ModelError as error:
        raise ConfigError(f"export to {target}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        found.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
