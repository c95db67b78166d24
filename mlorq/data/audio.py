"""Source ``audio``: recordings that a table names, with their transcripts or classes."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import READERS, chosen_rows
from mlorq.data.contents import contents
from mlorq.data.metrics import WORD_ERRORS
from mlorq.data.model_inputs import recogniser, sound_classifier
from mlorq.data.packages import SOUNDFILE
from mlorq.data.source import (
    SOURCES,
    BatchSettings,
    DataSource,
    LabelSettings,
    ListSettings,
    MetricSettings,
    ModelSettings,
    PathSettings,
    Role,
    RootSettings,
)
from mlorq.errors import DataError
from mlorq.models.tasks import SPEECH

if TYPE_CHECKING:
    from mlorq.data.base import Dataset

ACCURACY = "accuracy"


class AudioSettings(BatchSettings, ListSettings, MetricSettings, LabelSettings, RootSettings, PathSettings):
    """Keys of a table of recordings."""

    audio: int | str | None = Field(
        None, description="column of the recordings' files, by name, or by number in a table without a header"
    )
    language: str | None = Field(
        None, description="language of the recordings, for a model of several (Whisper); default: it is detected"
    )


class AudioSource(DataSource[AudioSettings]):
    """Recordings that a table names."""

    name = "audio"
    settings = AudioSettings
    needed = ("path", "audio")
    package = SOUNDFILE

    def check_role(self, settings: AudioSettings, role: Role) -> None:
        """Evaluation data needs transcripts or classes."""
        if role == "evaluation" and settings.label is None:
            raise ValueError(f"label: source {self.name} needs the column of transcripts or classes in evaluation data")

    def locations(self, settings: AudioSettings) -> Sequence[str | None]:
        """The table, the folder of the recordings and the list of samples."""
        root = settings.root
        if root is None and settings.path is not None:
            root = posixpath.dirname(settings.path) or "."
        return settings.path, root, settings.list

    def load(self, settings: AudioSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the chosen recordings and their transcripts or classes; see ``DataSource.load``."""
        from mlorq.data.columns import read_columns
        from mlorq.data.sounds import sound_dataset
        from mlorq.data.speech import Recording, speech_dataset

        sounds = sound_classifier(model, folder)
        metric, kind = (WORD_ERRORS, "speech") if sounds is None else (ACCURACY, "classes of recordings")
        if settings.metric not in (None, metric):
            raise DataError(f"metric {settings.metric!r} does not fit {kind}; choose {metric}")
        if sounds is not None and settings.language is not None:
            raise DataError(f"language is for task {SPEECH}: leave it out")
        inputs = recogniser(model, folder, self.name, settings.language) if sounds is None else None
        assert settings.path is not None
        assert settings.audio is not None
        location = resolve_location(settings.path, folder)
        wanted = [settings.audio, *([] if settings.label is None else [settings.label])]
        columns, numbers = read_columns(location, wanted)
        origin = f"table {location}"
        picked = chosen_rows(settings, numbers, origin, folder, seed)

        def entry(column: int | str, what: str, index: int) -> str:
            text = columns[column][index]
            if text is None or not str(text).strip():
                raise DataError(f"{origin}, row {numbers[index]}, column {column!r}: the {what} is missing")
            return str(text)

        files = [entry(settings.audio, "recording's file", index) for index in picked]
        texts: Sequence[str | None] = [None] * len(files)
        if settings.label is not None:
            texts = [entry(settings.label, "transcript" if inputs else "class", index) for index in picked]
        root = location.rpartition("/")[0] if settings.root is None else resolve_location(settings.root, folder)
        with ThreadPoolExecutor(READERS) as pool:
            encoded = list(pool.map(partial(_read, root), files))
        parts = zip(files, encoded, texts, strict=True)
        recordings = [Recording(*part) for part in parts]
        if sounds is not None:
            where = [f"{origin}, row {numbers[index]}, column {settings.label!r}" for index in picked]
            return sound_dataset(recordings, where, settings, role, sounds)
        assert inputs is not None
        return speech_dataset(recordings, settings, role, inputs, origin)


def _read(root: str, file: str) -> bytes:
    fs, path = url_to_fs(resolve_location(file, root))
    return contents(fs, path, f"recording {file}", f"does not exist in {root}")


SOURCES.register(AudioSource())
