"""The interface and registry of export targets, and ``export``, which converts a checkpoint."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from mlorq.errors import ConfigError, no_secrets
from mlorq.extras import install_command
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.batches import Batch

Config = TypeVar("Config", bound=Settings)


class ExportTarget(ABC, Generic[Config]):
    """A file format to which checkpoints are converted.

    Attributes:
        name: its name on the command line.
        title: a short description for help texts.
        settings: class of its options.
        configured: class of the options that a run's configuration may set; None: all. Others are values of Python, or
            have effects outside the files.
        locations: those of them that hold locations; relative paths start from the configuration's folder.
        suffixes: suffixes of output paths that select this target by default; a target without any writes a folder.
        packages: import names of the packages that it needs.
        extra: the extra of mlorq that installs them; None: they have to be named.
        meanings: of figures of ``summary`` by name, for display.
        seconds: for estimates: seconds of an export, and seconds per weight of the compressible layers.
    """

    name: str
    title: str
    settings: type[Config]
    configured: ClassVar[type[Settings] | None] = None
    locations: ClassVar[tuple[str, ...]] = ()
    suffixes: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    meanings: ClassVar[Mapping[str, str]] = {}
    seconds: ClassVar[tuple[float, float]] = (1.0, 4e-8)  # measured: dense, MiniLM and ViT-Base, 2 cores

    @abstractmethod
    def write(self, checkpoint: str, output: str, settings: Config) -> list[str]:
        """Write the exported files.

        Args:
            checkpoint: folder or fsspec URL of a compressed model.
            output: path or fsspec URL of the file or folder to write.
            settings: options.

        Returns:
            Locations of the written files.

        Raises:
            CheckpointError: the checkpoint is missing or damaged, or the target cannot hold it.
        """

    def with_model(self, settings: Config, model: nn.Module, example: Batch) -> Config:
        """Options for a model whose checkpoint does not determine its architecture.

        Args:
            settings: options.
            model: a float instance of the architecture, on the CPU.
            example: a batch of its inputs.
        """
        return settings

    def summary(self, files: Sequence[str]) -> dict[str, Any]:
        """Figures of written files, as JSON values, for display.

        Args:
            files: result of ``write``.
        """
        return {}


TARGETS: Registry[ExportTarget[Any]] = Registry("export target")


@no_secrets()
def export(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], to: str | None = None, **options: Any
) -> list[str]:
    """Convert a checkpoint to files for other software.

    Args:
        checkpoint: folder or fsspec URL of a compressed model.
        output: path or fsspec URL of the file or folder to write.
        to: name of the target; default: selected by the suffix of ``output``.
        options: options of the target.

    Returns:
        Locations of the written files.

    Raises:
        ConfigError: the target or an option is unknown, the suffix selects no target, or a package is missing.
        CheckpointError: the checkpoint is missing or damaged, or the target cannot hold it.
    """
    target = target_of(output, to)
    require(f"export to {target.name}", target.packages, target.extra)
    try:
        settings = target.settings.model_validate(options)
        settings.check()
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        known = ", ".join(sorted(target.settings.model_fields)) or "none"
        raise ConfigError(f"export to {target.name}: option {name!r}: {problem['msg']}; known: {known}") from None
    except ValueError as error:
        raise ConfigError(f"export to {target.name}: {error}") from None
    return target.write(os.fspath(checkpoint), os.fspath(output), settings)


def target_of(output: str | os.PathLike[str], to: str | None = None) -> ExportTarget[Any]:
    """The target with a name; without one, the target of the suffix of ``output``.

    Raises:
        ConfigError: the name is unknown, or the suffix selects no target.
    """
    if to is not None:
        return TARGETS[to]
    for target in TARGETS:
        if os.fspath(output).lower().endswith(target.suffixes):
            return target
    raise ConfigError(
        f"export: the suffix of {os.fspath(output)!r} selects no target; give one: {', '.join(TARGETS.names())}"
    )


def require(needed_by: str, packages: Sequence[str], extra: str | None) -> None:
    """Check that packages are installed.

    Args:
        needed_by: the feature that needs them, for the error.
        packages: their import names.
        extra: the extra of mlorq that installs them; None: they have to be named.

    Raises:
        ConfigError: one is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            advice = install_command(extra) if extra else f"pip install {package}"
            raise ConfigError(f"{needed_by} needs the package {package}: {advice}")
