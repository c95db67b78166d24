"""Source ``captions``: a table of image files and their captions, for models of images and texts."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from fsspec.core import url_to_fs

from mlorq.artifacts.locations import resolve_location
from mlorq.data import model_inputs
from mlorq.data.choose import READERS, chosen_rows, read_image
from mlorq.data.metrics import RECALL
from mlorq.data.source import (
    SOURCES,
    BatchSettings,
    DataSource,
    ImageColumnSettings,
    ListSettings,
    MetricSettings,
    ModelSettings,
    PathSettings,
    Role,
    RootSettings,
    TextColumnsSettings,
)
from mlorq.errors import DataError

if TYPE_CHECKING:
    from mlorq.data.base import Dataset


class CaptionsSettings(
    ImageColumnSettings, TextColumnsSettings, BatchSettings, ListSettings, MetricSettings, PathSettings, RootSettings
):
    """Keys of a table of captions."""

    def check(self) -> None:
        """Refuse more than one text column."""
        super().check()
        if self.text is not None and len(self.text) > 1:
            raise ValueError(f"text has {len(self.text)} columns: captions are in one")


class CaptionsSource(DataSource[CaptionsSettings]):
    """Images of a folder with captions in a CSV, TSV or Parquet table; a row per caption."""

    name = "captions"
    settings = CaptionsSettings
    needed = ("root", "path", "text")

    def locations(self, settings: CaptionsSettings) -> Sequence[str | None]:
        """The images, the table and the list of samples."""
        return settings.root, settings.path, settings.list

    def load(self, settings: CaptionsSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the chosen rows, each image once. See ``DataSource.load``."""
        from mlorq.data.captioned import caption_dataset, check_metric
        from mlorq.data.columns import read_columns
        from mlorq.data.images import Image
        from mlorq.data.texts import checked_texts

        towers = model_inputs.required(model_inputs.two_towers(model, folder), self.name, "captioned")
        check_metric(settings.metric, RECALL, "captions")
        assert settings.root is not None
        assert settings.path is not None
        assert settings.text is not None
        location = resolve_location(settings.path, folder)
        (column,) = settings.text
        columns, numbers = read_columns(location, [settings.image, column])
        files = columns[settings.image]
        for file, number in zip(files, numbers, strict=True):
            if not isinstance(file, str) or not file:
                raise DataError(f"table {location}, row {number}, column {settings.image!r}: the image file is missing")
        captions = checked_texts(columns[column], lambda i: f"table {location}, row {numbers[i]}, column {column!r}")
        picked = chosen_rows(settings, numbers, f"table {location}", folder, seed)
        root = resolve_location(settings.root, folder)
        fs, path = url_to_fs(root)
        if not fs.isdir(path):
            raise DataError(f"image folder {root} does not exist")
        wanted = list(dict.fromkeys(files[index] for index in picked))
        with ThreadPoolExecutor(READERS) as pool:
            contents = pool.map(lambda file: read_image(fs, posixpath.join(path, file)), wanted)
            images = {file: Image(file, data, None, "") for file, data in zip(wanted, contents, strict=True)}
        chosen = [images[files[index]] for index in picked]
        return caption_dataset(chosen, [captions[index] for index in picked], settings.batch_size, role, towers)


SOURCES.register(CaptionsSource())
