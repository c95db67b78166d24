"""What an export target is, and the one call that exports a checkpoint."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from mlorq.errors import ConfigError
from mlorq.registry import Registry, Settings

Config = TypeVar("Config", bound=Settings)


class ExportTarget(ABC, Generic[Config]):
    """One kind of file that a checkpoint becomes.

    Attributes:
        name: as the command line has it.
        title: for people.
        settings: options of the target.
        suffixes: endings of output paths that mean this target where none is named.
        packages: importable packages that it needs.
    """

    name: str
    title: str
    settings: type[Config]
    suffixes: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def write(self, checkpoint: str, output: str, settings: Config) -> list[str]:
        """Write the exported files.

        Args:
            checkpoint: folder or fsspec URL of a compressed model.
            output: path or fsspec URL of the file or folder to write.
            settings: options.

        Returns:
            Where the files are.

        Raises:
            CheckpointError: the checkpoint is missing or damaged, or the target cannot hold it.
        """


TARGETS: Registry[ExportTarget[Any]] = Registry("export target")


def export(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], to: str | None = None, **options: Any
) -> list[str]:
    """Turn a checkpoint into files for other software.

    Args:
        checkpoint: folder or fsspec URL of a compressed model.
        output: path or fsspec URL of what is written.
        to: name of the target; default: the one that the ending of ``output`` means.
        options: of the target.

    Returns:
        Where the files are.

    Raises:
        ConfigError: no such target or option, no target for the ending, or a package is missing.
        CheckpointError: the checkpoint is missing or damaged, or the target cannot hold it.
    """
    target = TARGETS[to] if to is not None else _by_suffix(os.fspath(output))
    for package in target.packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"export to {target.name} needs the package {package}: pip install {package}")
    try:
        settings = target.settings.model_validate(options)
        settings.check()
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        known = ", ".join(target.settings.model_fields) or "none"
        raise ConfigError(f"export to {target.name}: option {name!r}: {problem['msg']}; known: {known}") from None
    except ValueError as error:
        raise ConfigError(f"export to {target.name}: {error}") from None
    return target.write(os.fspath(checkpoint), os.fspath(output), settings)


def _by_suffix(output: str) -> ExportTarget[Any]:
    for target in TARGETS:
        if output.lower().endswith(target.suffixes):
            return target
    raise ConfigError(f"export: the ending of {output!r} names no target; give one: {', '.join(TARGETS.names())}")
