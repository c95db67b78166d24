"""Source ``text_file``: running text in UTF-8 files, for language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fsspec.core import url_to_fs

from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import before_glob
from mlorq.data.contents import contents, text_of
from mlorq.data.model_inputs import text_inputs
from mlorq.data.source import SOURCES, DataSource, LanguageSettings, ModelSettings, PathSettings, Role
from mlorq.errors import DataError
from mlorq.models.tasks import tasks_of

if TYPE_CHECKING:
    from mlorq.data.base import Dataset


class TextFileSettings(LanguageSettings, PathSettings):
    """Keys of files of running text."""


class TextFileSource(DataSource[TextFileSettings]):
    """Running text: a file, a folder of ``.txt`` files, or a glob."""

    name = "text_file"
    settings = TextFileSettings
    needed = ("path",)

    def locations(self, settings: TextFileSettings) -> Sequence[str | None]:
        """The file, or the folder of the files."""
        return (before_glob(settings.path),)

    def load(self, settings: TextFileSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the text of all files, in the order of their names, as pieces of tokens; see ``DataSource.load``."""
        from mlorq.data.language import language_dataset

        inputs = text_inputs(model, folder, self.name)
        if inputs.predicts not in ("next", "masked"):
            raise DataError(f"source {self.name} is for models with task {tasks_of('language')}; use source table")
        assert settings.path is not None
        location = resolve_location(settings.path, folder)
        return language_dataset(_texts(location), f"text {location}", settings, role, inputs, seed)


def _texts(location: str) -> list[str]:
    """The contents of a file, of the text files of a folder, or of those of a glob."""
    fs, path = url_to_fs(location)
    if any(mark in path for mark in "*?["):
        files = sorted(fs.glob(path))
    elif fs.isdir(path):
        files = sorted(file for file in fs.find(path) if file.endswith(".txt"))
    else:
        files = [path]
    if not files:
        raise DataError(f"text {location}: there are no files")
    found = []
    for file in files:
        found.append(text_of(contents(fs, file, f"text {file}"), f"text {file}"))
    return found


SOURCES.register(TextFileSource())
