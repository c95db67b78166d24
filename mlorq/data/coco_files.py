"""Files of COCO annotations and their images: reading, choice of images, and batches that are made when asked for."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from fsspec.core import url_to_fs

from mlorq.artifacts.hashing import digest_bytes
from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import READERS, read_image, seeded_choice
from mlorq.data.coco import CocoSettings
from mlorq.data.contents import contents
from mlorq.data.pixels import decoded
from mlorq.errors import DataError, one_line

LARGEST = 2**17  # pixels of a side


@dataclass(frozen=True)
class CocoImage:
    """An image of a file of annotations: its id, its path below the root, its size in pixels, and the encoded bytes."""

    id: int
    path: str
    height: int
    width: int
    data: bytes = field(default=b"", repr=False)


def load_images(
    truth: Mapping[str, Any],
    settings: CocoSettings,
    location: str,
    folder: str,
    seed: int,
    kept: set[int] | None = None,
) -> list[CocoImage]:
    """The chosen images of a file of annotations with their contents, sorted by id.

    Args:
        truth: contents of the file.
        settings: root and number of samples.
        location: the file, for errors.
        folder: base of relative paths.
        seed: of the choice.
        kept: ids of the images to choose from; None: all.

    Raises:
        DataError: there are no or too few images, or one is malformed or missing.
    """
    assert settings.root is not None
    rows = [_image(row, location) for row in truth["images"]]
    images = _choose([row for row in rows if kept is None or row.id in kept], settings.samples, seed, location)
    root = resolve_location(settings.root, folder)
    fs, path = url_to_fs(root)
    if not fs.isdir(path):
        raise DataError(f"image folder {root} does not exist")
    with ThreadPoolExecutor(READERS) as pool:
        encoded = list(pool.map(lambda image: read_image(fs, posixpath.join(path, image.path)), images))
    return [replace(image, data=data) for image, data in zip(images, encoded, strict=True)]


def image_names(images: Sequence[CocoImage]) -> list[list[str]]:
    """File names and digests of contents, for keys of data sets."""
    return [[posixpath.basename(image.path), digest_bytes(image.data)] for image in images]


class CocoBatches(Sequence[Any]):
    """Batches made on access, by aspect ratio; kept afterwards if ``keep``, for data that is used many times.

    Args:
        images: the images of all batches.
        prepare: makes a batch of images.
        size: images per batch.
        keep: whether batches are kept.
    """

    def __init__(
        self,
        images: Sequence[CocoImage],
        prepare: Callable[[Sequence[CocoImage]], Any],
        size: int,
        *,
        keep: bool = False,
    ) -> None:
        # By aspect ratio, landscapes first, then by id.
        self.images = sorted(images, key=lambda image: (image.height / image.width, image.id))
        self._prepare, self._size, self._keep = prepare, size, keep
        self._kept: dict[int, Any] = {}

    @property
    def samples(self) -> int:
        """Number of images in all batches."""
        return len(self.images)

    def spread(self, batches: int) -> CocoBatches:
        """``batches`` of the batches, evenly spaced."""
        picked = [int((index + 0.5) * len(self) / batches) for index in range(batches)]
        return CocoBatches([image for index in picked for image in self.images_of(index)], self._prepare, self._size)

    def images_of(self, index: int) -> Sequence[CocoImage]:
        """The images of one batch."""
        return self.images[index * self._size : (index + 1) * self._size]

    def __len__(self) -> int:
        return -(-len(self.images) // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        if place in self._kept:
            return self._kept[place]
        batch = self._prepare(self.images_of(place))
        if self._keep:
            self._kept[place] = batch
        return batch


def read_annotations(location: str) -> dict[str, Any]:
    """The contents of a file of COCO instances, with references to images and categories checked.

    Raises:
        DataError: the file is missing, is not JSON, lacks a list, or refers to an image or category that it does not
            list.
    """
    fs, path = url_to_fs(location)
    data = contents(fs, path, f"annotations {location}", "do not exist")
    try:
        truth: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotations {location} are not JSON: {one_line(error)}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(truth, dict) or not isinstance(truth.get(part), list):
            raise DataError(f"annotations {location} have no list {part!r}")
    try:
        images = _ids(truth["images"], "image", location)
        categories = _ids(truth["categories"], "category", location)
        for row in truth["categories"]:
            if not isinstance(row["name"], str):  # detectors match classes by name
                raise DataError(f"annotations {location}: the name of category {row['id']} is not a text")
        for number, row in enumerate(truth["annotations"], 1):
            where = f"annotations {location}: annotation {row.get('id', f'number {number}')!s:.60}"
            if row["category_id"] not in categories:
                raise DataError(f"{where} has category {row['category_id']!s:.60}, which is not listed")
            if row["image_id"] not in images:
                raise DataError(f"{where} has image {row['image_id']!s:.60}, which is not listed")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"annotations {location}: an entry lacks {one_line(error)}") from error
    return truth


def _ids(rows: Sequence[Mapping[str, Any]], kind: str, location: str) -> set[int]:
    """The ids of images or categories: different integers, because results refer to them."""
    found: set[int] = set()
    for row in rows:
        if type(row["id"]) is not int or abs(row["id"]) >= 2**63:
            raise DataError(f"annotations {location}: {kind} id {row['id']!r:.60} is not an integer of 64 bits")
        if row["id"] in found:
            raise DataError(f"annotations {location}: {kind} id {row['id']} occurs twice")
        found.add(row["id"])
    return found


def _image(row: Mapping[str, Any], location: str) -> CocoImage:
    try:
        found = CocoImage(int(row["id"]), str(row["file_name"]), int(row["height"]), int(row["width"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"annotations {location}: image {row.get('id')!s:.60} is malformed: {one_line(error)}"
        ) from error
    if not (0 < found.height < LARGEST and 0 < found.width < LARGEST):
        raise DataError(f"annotations {location}: image {found.id} is {found.width} × {found.height}")
    return found


def _choose(images: list[CocoImage], samples: int | None, seed: int, location: str) -> list[CocoImage]:
    """All images or a seeded choice of them, sorted by id."""
    images = sorted(images, key=lambda image: image.id)
    if not images:
        raise DataError(f"annotations {location} list no images")
    return [images[index] for index in seeded_choice(len(images), samples, seed, f"annotations {location}", " images")]


def decode(image: CocoImage) -> Any:
    """The image of Pillow, RGB.

    Raises:
        DataError: it cannot be decoded, or has not the size in the annotations.
    """
    found = decoded(image.data, image.path, "RGB")
    if found.size != (image.width, image.height):
        width, height = found.size
        raise DataError(
            f"image {image.path} is {width} × {height}, but {image.width} × {image.height} in the annotations"
        )
    return found
