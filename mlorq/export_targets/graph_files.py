"""What targets that write graphs share: options, and files with a tokenizer's files beside them."""

from __future__ import annotations

import posixpath
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.export_targets.base import ExportTarget
from mlorq.models.preparation import GENERATION, PREPARATION
from mlorq.registry import Settings
from mlorq.scratch import scratch_folder

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.batches import Batch

NONE = "none"  # value of ``tokenizer``
SAMPLES = 4  # of an example: exporters take an axis of size 1 for a constant; the comparison has one less besides


class GraphConfig(Settings):
    """Options of targets that write graphs."""

    tokenizer: str | None = Field(
        None,
        description="folder, folder inside a package, or hub name of the tokenizer to write beside the file; default: "
        "that of the checkpoint, if it has one; none: no files",
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
    meanings: ClassVar[Mapping[str, str]] = {
        "difference": "largest error of one output value against mlorq.load, as a share of the largest output, on "
        f"{2 * SAMPLES - 1} random samples; below 1e-5 is rounding of float32, 0.01 to 0.1 usual with 8-bit products",
        "nmse_added": "NMSE of the outputs against those of mlorq.load, on the same inputs",
    }

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
        from mlorq.checkpoint.preparation import read_preparation

        self.check_output(output)
        info = inspect(checkpoint)
        beside = files_beside(output, settings.tokenizer, self.name, read_preparation(checkpoint, info))
        files = self.contents(output, load(checkpoint, settings.model), info["architecture"], settings)
        return write_files(output, files | beside)

    def with_model(self, settings: Options, model: nn.Module, example: Batch) -> Options:
        return settings.model_copy(update={"model": model, "example": example})


def files_beside(output: str, tokenizer: str | None, target: str, own: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer or image processor to write beside a graph, by location.

    Args:
        output: path or fsspec URL of the graph.
        tokenizer: folder, folder inside a package, or hub name of a tokenizer; ``none``: no files; None: the
            checkpoint's own files.
        target: name of the export target, for errors.
        own: the checkpoint's own files by name.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
        CheckpointError: no tokenizer is named, and the folder has that of another model.
    """
    folder = posixpath.dirname(output)
    if tokenizer is None:
        found = {name: data for name, data in own.items() if name in (*PREPARATION, *GENERATION)}
        _check_others(folder, found, target)
    else:
        found = {} if tokenizer == NONE else _tokenizer_files(tokenizer, target)
    return {posixpath.join(folder, name): data for name, data in found.items()}


def write_files(output: str, files: Mapping[str, bytes]) -> list[str]:
    """Write files by location, and return the locations.

    Args:
        output: location of the graph, for errors.
        files: contents by location.

    Raises:
        CheckpointError: a file cannot be written.
    """
    from mlorq.artifacts.transfer import os_errors, put_file

    try:
        with os_errors():
            for location, data in files.items():
                fs, path = url_to_fs(location)
                fs.makedirs(posixpath.dirname(path) or ".", exist_ok=True)
                put_file(fs, path, data)
    except (OSError, ImportError) as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error
    return list(files)


def _check_others(folder: str, source: Mapping[str, bytes], target: str) -> None:
    """Refuse to replace files that nobody asked to replace."""
    from mlorq.artifacts.transfer import os_errors

    for name, data in source.items():
        location = posixpath.join(folder, name)
        try:
            with os_errors():
                fs, path = url_to_fs(location)
                differs = fs.exists(path) and fs.cat_file(path) != data
        except (OSError, ImportError) as error:
            raise CheckpointError(f"{location} cannot be written: {error}") from error
        if differs:
            raise CheckpointError(
                f"export to {target}: {location} is of another model: give another folder, or option tokenizer={NONE} "
                "to write no tokenizer"
            )


def _tokenizer_files(name: str, target: str) -> dict[str, bytes]:
    """The files of a tokenizer by name."""
    from mlorq.models.transformers import TransformersSettings, tokenizer

    try:
        found = tokenizer(TransformersSettings(name=name, task="sentence-similarity"), named="option tokenizer")
    except ModelError as error:
        raise ConfigError(f"export to {target}: {error}") from error
    with scratch_folder() as folder:
        found.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
