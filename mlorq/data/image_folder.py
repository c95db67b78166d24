"""Source ``image_folder``: images in a local or remote folder, with labels from a table or from subfolder names."""

from __future__ import annotations

import os
import posixpath
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.data.choose import READERS, indices_of, listed_samples, read_image, seeded_choice
from mlorq.data.contents import contents
from mlorq.data.delimited import read_rows
from mlorq.data.metrics import ZERO_SHOT
from mlorq.data.model_inputs import two_towers
from mlorq.data.source import SOURCES, DataSource, ImageSettings, ModelSettings, Role, RootSettings, SplitSettings
from mlorq.errors import DataError, hide_secrets
from mlorq.models.tasks import DEPTHS, MAPS

if TYPE_CHECKING:
    from mlorq.data.base import Dataset

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".qoi"),
)
# Images that Pillow does not read by itself, or not as pictures: an error is better than a class without them.
UNREADABLE = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf"),
    *(".rw2", ".raf", ".dcm"),
)
LARGEST = 2**31  # class number
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "calibration"}

Prompts = list[str]  # defined here because ``list`` is a key in the class below


class ImageFolderSettings(ImageSettings, SplitSettings, RootSettings):
    """Keys of a folder of images."""

    labels: str | None = Field(None, description="TSV or CSV table with columns file, label[, split]")
    masks: str | None = Field(
        None,
        description="semantic segmentation: folder of label maps, PNG files with the relative names of the images; "
        "pixels are class numbers",
    )
    ignored_label: int = Field(255, ge=0, description="with masks: value of pixels that do not count")
    depths: str | None = Field(
        None,
        description="depth estimation: folder of depth maps, PNG or NPY files with the relative names of the images; "
        "pixels of 0 do not count",
    )
    depth_scale: float = Field(1.0, gt=0, description="with depths: value per unit, such as 1000 for millimetres")
    depth_align: Literal["depth", "inverse"] | None = Field(
        None,
        description="with depths: fit scale and shift of each prediction, to the depth or, for models that predict it, "
        "to the inverse depth",
    )
    class_names: str | None = Field(
        None,
        description="models of images and texts: text file with the name of a class per line; default: the names of "
        "the folders, with spaces for underscores",
    )
    prompts: Prompts = Field(
        ["a photo of a {}"],
        min_length=1,
        description="models of images and texts: texts of a class, with {} for its name; calibration uses the first",
    )

    def check(self) -> None:
        """Refuse prompts without a place for the name."""
        super().check()
        for prompt in self.prompts:
            if "{}" not in prompt:
                raise ValueError(f"prompts: {prompt!r} has no {{}} in the place of the class name")


class ImageFolderSource(DataSource[ImageFolderSettings]):
    """Images of a folder."""

    name = "image_folder"
    settings = ImageFolderSettings
    needed = ("root",)

    def locations(self, settings: ImageFolderSettings) -> Sequence[str | None]:
        """The folder, the table of labels or folder of maps, the class names and the list of samples."""
        return settings.root, settings.labels, settings.masks, settings.depths, settings.class_names, settings.list

    def load(self, settings: ImageFolderSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the chosen images of a folder; other files are not read. See ``DataSource.load``."""
        from mlorq.data.captioned import check_metric, class_names, zero_shot_dataset
        from mlorq.data.depth_maps import depth_dataset, read_depth_maps
        from mlorq.data.images import Image, check_images, image_dataset
        from mlorq.data.label_maps import read_label_maps, segmentation_dataset

        towers = two_towers(model, folder)
        inputs = None if towers else check_images(settings, model, folder, self.name, ("images", "captioned"))
        segments = inputs is not None and inputs.maps
        measures = inputs is not None and inputs.depths
        if towers is not None:
            check_metric(settings.metric, ZERO_SHOT, "classes")
        if settings.masks and not segments:
            raise DataError(f"masks {settings.masks} are for task {MAPS}: leave masks out")
        if settings.depths and not measures:
            raise DataError(f"depths {settings.depths} are for task {DEPTHS}: leave depths out")
        if settings.labels and segments:
            raise DataError(f"labels {settings.labels} are not for task {MAPS}: give masks, a folder of label maps")
        if settings.labels and measures:
            raise DataError(f"labels {settings.labels} are not for task {DEPTHS}: give depths, a folder of depth maps")
        assert settings.root is not None
        root = resolve_location(settings.root, folder)
        fs, path = url_to_fs(root)
        if not fs.isdir(path):
            raise DataError(f"image folder {root} does not exist")
        if settings.split and not settings.labels:
            raise DataError(
                f"split {settings.split!r} of image folder {root}: give labels, a table with a column split"
            )
        images, classes = _chosen(fs, path, root, settings, folder, seed, maps=segments or measures)
        with ThreadPoolExecutor(READERS) as pool:
            encoded = list(pool.map(lambda image: read_image(fs, posixpath.join(path, image.path)), images))
        pairs = zip(images, encoded, strict=True)
        made = [Image(each.path, data, each.label, each.where, posixpath.basename(each.path)) for each, data in pairs]
        if towers is not None:
            names = class_names(settings.class_names, folder, classes, f"image folder {root}")
            return zero_shot_dataset(made, names, settings.prompts, settings.batch_size, role, towers)
        assert inputs is not None
        paths = [image.path for image in images]
        if role == "evaluation" and segments and settings.masks is not None:
            masks = read_label_maps(settings.masks, folder, made, paths, settings.ignored_label, inputs)
            return segmentation_dataset(made, masks, settings, inputs)
        if role == "evaluation" and measures and settings.depths is not None:
            depths = read_depth_maps(settings.depths, folder, made, paths, settings.depth_scale)
            return depth_dataset(made, depths, settings, settings.depth_align, inputs)
        return image_dataset(made, settings, role, inputs)


@dataclass(frozen=True)
class _Named:
    path: str  # relative to the root
    label: int | None
    where: str = ""  # of the label, for errors


def _chosen(
    fs: Any, path: str, root: str, settings: ImageFolderSettings, folder: str, seed: int, *, maps: bool
) -> tuple[list[_Named], list[str]]:
    """The chosen images of a folder, and the names of its classes if these are its subfolders.

    Args:
        fs: file system of the folder.
        path: the folder there.
        root: its location, for errors.
        settings: of the source.
        folder: base of relative paths.
        seed: of the choice of samples.
        maps: whether images have label maps in the place of classes.
    """
    classes: list[str] = []
    if settings.labels:
        images = _listed(settings, folder)
    elif maps:
        images = [_Named(name, None) for name in _images(_tree(fs, path)[0], hide_secrets(root))]
    else:
        images, classes = _found(fs, path, hide_secrets(root))
    of_split = f" of split {settings.split!r}" if settings.split else ""
    if not images:
        raise DataError(f"image folder {root} has no images{of_split}")
    chosen = listed_samples(settings, folder)
    if chosen is None:
        picked = seeded_choice(len(images), settings.samples, seed, f"image folder {root}")
    else:
        places = {image.path: index for index, image in enumerate(images)}
        picked = indices_of(chosen, places, f"image folder {root}{of_split}")
    return [images[index] for index in picked], classes


def _listed(settings: ImageFolderSettings, folder: str) -> list[_Named]:
    """Images in a table with columns file, label and, if a split is chosen, split."""
    assert settings.labels is not None
    location = resolve_location(settings.labels, folder)
    fs, path = url_to_fs(location)
    data = contents(fs, path, f"label table {location}")
    rows = read_rows(data, f"label table {location}", tabs=not path.endswith(".csv"), quotes=True)
    titles = rows[0][1] if rows else []
    for column in ("file", "label", *(("split",) if settings.split else ())):
        if column not in titles:
            raise DataError(f"label table {location} has no column {column!r}")
    numbered = [(number, dict(zip(titles, row, strict=False))) for number, row in rows[1:]]
    if settings.split:
        for number, row in numbered:
            if "split" not in row:
                raise DataError(f"label table {location}, row {number}: the split is missing")
        splits = ", ".join(sorted({row["split"] for _, row in numbered}))
        numbered = [(number, row) for number, row in numbered if row["split"] == settings.split]
        if not numbered:
            raise DataError(f"label table {location} has no split {settings.split!r}; it has {splits}")
    found: dict[str, _Named] = {}
    for number, row in numbered:
        image = _labelled(row, f"label table {location}, row {number}")
        if found.setdefault(image.path, image).label != image.label:
            first = found[image.path]
            raise DataError(
                f"{image.where}: file {image.path!r} has label {image.label}, but {first.label} in {first.where}"
            )
    return [_labelled(row, f"label table {location}, row {number}") for number, row in numbered]


def _labelled(row: Mapping[str, str], where: str) -> _Named:
    """The image and class number of a row."""
    for column in ("file", "label"):
        if not row.get(column):
            raise DataError(f"{where}: the {column} is missing")
    try:
        label = int(row["label"])
    except ValueError:
        label = LARGEST
    if abs(label) >= LARGEST:
        raise DataError(f"{where}: label {row['label']!r:.60} is not a class number")
    return _Named(row["file"], label, where)


def _images(files: Sequence[str], location: str) -> list[str]:
    """The images among files, sorted; those whose names begin with a dot, also of a folder, do not count."""
    shown = sorted(filter(_visible, files))
    unreadable = next((name for name in shown if name.lower().endswith(UNREADABLE)), None)
    if unreadable is not None:
        raise DataError(f"image {unreadable} of image folder {location} is of a kind that cannot be read: convert it")
    return [name for name in shown if name.lower().endswith(SUFFIXES)]


def _found(fs: Any, root: str, location: str) -> tuple[list[_Named], list[str]]:
    """Images under a folder, and the names of their classes.

    If images are in subfolders, these are the classes, numbered as torchvision does.

    Every subfolder of the root is a class, in alphabetical order; what is below it has its label. Files and folders
    whose names begin with a dot, which systems and editors create, do not count.
    """
    found, folders = _tree(fs, root)
    images = _images(found, location)
    files = list(filter(_visible, found))
    beside = [name for name in images if "/" not in name]
    if len(beside) == len(images):
        return [_Named(name, None) for name in images], []
    classes = sorted({name.partition("/")[0] for name in files if "/" in name} | set(filter(_visible, folders)))
    _check_level(location, classes, {posixpath.dirname(name) for name in images if "/" in name})
    if 2 * len(beside) > len(images):
        raise DataError(
            f"image folder {location} has {len(beside)} images beside {len(classes)} folders with "
            f"{len(images) - len(beside)}: move one of them, or give labels"
        )
    if beside:
        warnings.warn(
            f"image folder {location}: its folders are the classes; left out beside them: {_some(beside)}", stacklevel=3
        )
    filled = {name.partition("/")[0] for name in images if "/" in name}
    if empty := [name for name in classes if name not in filled]:
        warnings.warn(
            f"image folder {location}: no images in {_some(empty)}, which counts as a class all the same", stacklevel=3
        )
    numbers = {name: index for index, name in enumerate(classes)}
    inside = [name for name in images if "/" in name]
    named = [_Named(name, numbers[name.partition("/")[0]], f"image {name} (its folder)") for name in inside]
    return named, classes


def _check_level(location: str, classes: Sequence[str], parents: set[str]) -> None:
    """Refuse subfolders that are splits, or the one folder that holds those of the classes."""
    if len(classes) > 1 and SPLITS.issuperset(name.lower() for name in classes):
        raise DataError(f"image folder {location} has the splits {', '.join(classes)}: give the folder of one as root")
    if len(classes) == 1 and len({parent.split("/")[1] for parent in parents if "/" in parent}) > 1:
        raise DataError(
            f"image folder {location} has one folder, {classes[0]!r}, with folders in it: give that folder as root, "
            "or labels"
        )


def _visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _tree(fs: Any, root: str) -> tuple[list[str], list[str]]:
    """Paths of all files below a folder, relative to it, and names of its subfolders.

    Links to folders are followed, which fsspec does not. Empty folders exist in some file systems only.
    """
    if not isinstance(fs, LocalFileSystem):
        root = root.rstrip("/")
        rows = fs.ls(root, detail=True)
        folders = [posixpath.basename(row["name"].rstrip("/")) for row in rows if row["type"] == "directory"]
        return [posixpath.relpath(file, root) for file in fs.find(root)], folders
    files: list[str] = []
    for folder, below, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        # A link to a folder above itself would never end.
        below[:] = [each for each in below if not f"{here}/".startswith(f"{os.path.realpath(f'{folder}/{each}')}/")]
        files += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return files, [entry.name for entry in os.scandir(root) if entry.is_dir()]


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


SOURCES.register(ImageFolderSource())
