"""Source ``image_parquet``: encoded images and class numbers in Parquet shards of the hub's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlorq.data.choose import before_glob
from mlorq.data.source import (
    SOURCES,
    DataSource,
    ImageColumnSettings,
    ImageSettings,
    LabelSettings,
    ModelSettings,
    PathSettings,
    Role,
    SplitSettings,
)

if TYPE_CHECKING:
    from mlorq.data.base import Dataset


class ImageParquetSettings(ImageColumnSettings, ImageSettings, LabelSettings, SplitSettings, PathSettings):
    """Keys of images in Parquet shards."""

    def check(self) -> None:
        """Refuse a column number."""
        super().check()
        if isinstance(self.label, int):
            raise ValueError(f"label {self.label} is a number: give the name of the label column")


class ImageParquetSource(DataSource[ImageParquetSettings]):
    """Images in Parquet shards."""

    name = "image_parquet"
    settings = ImageParquetSettings
    needed = ("path",)

    def locations(self, settings: ImageParquetSettings) -> Sequence[str | None]:
        """The shards and the list of samples."""
        return before_glob(settings.path), settings.list

    def load(self, settings: ImageParquetSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the chosen images of a file, a folder of shards or a glob; see ``DataSource.load``."""
        from mlorq.data.images import check_images, image_dataset
        from mlorq.data.parquet_images import read_images

        described = check_images(settings, model, folder, self.name)
        return image_dataset(read_images(settings, role, folder, seed), settings, role, described)


SOURCES.register(ImageParquetSource())
