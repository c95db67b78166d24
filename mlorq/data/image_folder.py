"""Source ``image_folder``: images in a local or remote folder, with labels from a table or from subfolder names."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import READERS, indices_of, listed_samples, read_image, seeded_choice
from mlorq.data.source import SOURCES, DataSource, ImageSettings, ModelSettings, Role, RootSettings, SplitSettings
from mlorq.errors import DataError

if TYPE_CHECKING:
    from mlorq.data.base import Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


class ImageFolderSettings(ImageSettings, SplitSettings, RootSettings):
    """Keys of a folder of images."""

    labels: str | None = Field(None, description="TSV or CSV table with columns file, label[, split]")


class ImageFolderSource(DataSource[ImageFolderSettings]):
    """Images of a folder."""

    name = "image_folder"
    settings = ImageFolderSettings
    needed = ("root",)

    def locations(self, settings: ImageFolderSettings) -> Sequence[str | None]:
        """The folder, the table of labels and the list of samples."""
        return settings.root, settings.labels, settings.list

    def load(self, settings: ImageFolderSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the chosen images of a folder; other files are not read. See ``DataSource.load``."""
        from mlorq.data.images import Image, check_images, image_dataset

        described = check_images(settings, model, self.name)
        assert settings.root is not None
        root = resolve_location(settings.root, folder)
        fs, path = url_to_fs(root)
        if not fs.isdir(path):
            raise DataError(f"image folder {root} does not exist")
        if settings.split and not settings.labels:
            raise DataError(
                f"split {settings.split!r} of image folder {root}: give labels, a table with a column split"
            )
        images = _listed(settings, folder) if settings.labels else _found(fs, path)
        of_split = f" of split {settings.split!r}" if settings.split else ""
        if not images:
            raise DataError(f"image folder {root} has no images{of_split}")
        chosen = listed_samples(settings, folder)
        if chosen is None:
            picked = seeded_choice(len(images), settings.samples, seed, f"image folder {root}")
        else:
            places = {image.path: index for index, image in enumerate(images)}
            picked = indices_of(chosen, places, f"image folder {root}{of_split}")
        images = [images[index] for index in picked]
        with ThreadPoolExecutor(READERS) as pool:
            contents = list(pool.map(lambda image: read_image(fs, posixpath.join(path, image.path)), images))
        pairs = zip(images, contents, strict=True)
        return image_dataset(
            [Image(each.path, data, each.label, each.where, posixpath.basename(each.path)) for each, data in pairs],
            settings,
            role,
            described,
        )


@dataclass(frozen=True)
class _Named:
    path: str  # relative to the root
    label: int | None
    where: str = ""  # of the label, for errors


def _listed(settings: ImageFolderSettings, folder: str) -> list[_Named]:
    """Images in a table with columns file, label and, if a split is chosen, split."""
    assert settings.labels is not None
    location = resolve_location(settings.labels, folder)
    fs, path = url_to_fs(location)
    try:
        text = fs.cat_file(path).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"label table {location} does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"label table {location} cannot be read: {error}") from error
    rows = list(csv.DictReader(io.StringIO(text), delimiter="," if path.endswith(".csv") else "\t"))
    wanted = ("file", "label", *(("split",) if settings.split else ()))
    for column in wanted:
        if not rows or column not in rows[0]:
            raise DataError(f"label table {location} has no column {column!r}")
    numbered = list(enumerate(rows, 2))
    if settings.split:
        numbered = [(number, row) for number, row in numbered if row["split"] == settings.split]
        if not numbered:
            splits = ", ".join(sorted({str(row["split"]) for row in rows}))
            raise DataError(f"label table {location} has no split {settings.split!r}; it has {splits}")
    images = []
    for number, row in numbered:
        try:
            images.append(_Named(row["file"], int(row["label"]), f"label table {location}, row {number}"))
        except (TypeError, ValueError):
            raise DataError(
                f"label table {location}, row {number}: label {row['label']!r} is not a class number"
            ) from None
    return images


def _found(fs: Any, root: str) -> list[_Named]:
    """Images under a folder; if all are in subfolders, the sorted subfolders are the classes."""
    files = sorted(file for file in fs.find(root) if file.lower().endswith(SUFFIXES))
    relative = [posixpath.relpath(file, root.rstrip("/")) for file in files]
    parents = sorted({posixpath.dirname(name) for name in relative})
    if "" in parents:
        return [_Named(name, None) for name in relative]
    classes = {parent: index for index, parent in enumerate(parents)}
    return [_Named(name, classes[posixpath.dirname(name)], f"image {name} (its folder)") for name in relative]


SOURCES.register(ImageFolderSource())
