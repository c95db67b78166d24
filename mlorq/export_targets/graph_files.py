"""What targets that write graphs share: options, and files with a tokenizer's files beside them."""

from __future__ import annotations

import posixpath
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.export_targets.base import ExportTarget
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.base import Batch


class GraphConfig(Settings):
    """Options of targets that write graphs."""

    tokenizer: str | None = Field(
        None, description="folder, folder inside a package, or hub name of the tokenizer to write beside the file"
    )
    part: str = Field("", description="submodule to export; default: what the family can export")


class GraphSettings(GraphConfig):
    """The same with those of Python alone."""

    model: Any = Field(None, description="Python only: instance of the float architecture, for user-defined modules")
    example: Any = Field(None, description="Python only: a batch of at least two samples to trace the model with")


Options = TypeVar("Options", bound=GraphSettings)


class GraphTarget(ExportTarget[Options]):
    """A target that writes the graph of a model."""

    locations: ClassVar[tuple[str, ...]] = ("tokenizer",)

    @abstractmethod
    def contents(
        self, output: str, module: nn.Module, architecture: Mapping[str, Any], settings: Options
    ) -> dict[str, bytes]:
        """The files of a graph by location.

        Args:
            output: path or fsspec URL of the main file.
            module: the compressed module, on the CPU.
            architecture: its architecture, as in the checkpoint's description.
            settings: options.

        Raises:
            CheckpointError: the graph cannot be exported, or differs from the module.
        """

    def check_output(self, output: str) -> None:
        """Refuse an output path before anything is computed.

        Raises:
            ConfigError: the suffix is wrong.
        """
        return

    def write(self, checkpoint: str, output: str, settings: Options) -> list[str]:
        from mlorq.checkpoint.io import inspect, load

        self.check_output(output)
        architecture = inspect(checkpoint)["architecture"]
        files = self.contents(output, load(checkpoint, settings.model), architecture, settings)
        return write_beside(output, files, settings.tokenizer, self.name)

    def with_model(self, settings: Options, model: nn.Module, example: Batch) -> Options:
        return settings.model_copy(update={"model": model, "example": example})


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
