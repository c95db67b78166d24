"""Image processors of transformers: from images to batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlorq.errors import DataError, ModelError, one_line
from mlorq.models.hub_names import load_problem

if TYPE_CHECKING:
    from mlorq.models.batches import Batch

# Entries of an image processor that do not affect the batches.
NOT_PREPROCESSING = ("_processor_class", "image_processor_type", "processor_class")
SQUARE = 512  # side of the image whose prepared size is looked at


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocessing of images for a model.

    Attributes:
        prepare: a batch from images, which are Pillow's.
        described: its settings as JSON values, for keys of data sets.
        processor: the image processor itself.
    """

    prepare: Callable[[Sequence[Any]], Batch]
    described: dict[str, Any]
    processor: Any = None


def load_processor(location: str, name: str, keys: Sequence[str] = ("pixel_values",)) -> ImageProcessor:
    """The image processor of a folder or a hub name.

    Args:
        location: the folder or the hub name.
        name: the model's name, for errors.
        keys: entries of a batch, of those that the processor makes.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(location)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        text = load_problem(error, location)
        raise ModelError(f"model {name!r}: its image processor cannot be loaded: {text}") from error

    def prepare(images: Sequence[Any]) -> Batch:
        try:
            found = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        except ValueError as error:
            if len({image.size for image in images}) == 1:
                raise
            problem = f"images of several sizes do not go into one batch (set batch_size: 1): {one_line(error)}"
            raise DataError(f"model {name!r}: {problem}") from error
        return {key: found[key] for key in keys if key in found}

    described = json.loads(processor.to_json_string())
    described = {key: value for key, value in described.items() if key not in NOT_PREPROCESSING}
    return ImageProcessor(prepare, described, processor)


def prepared_size(location: str, name: str) -> list[int] | None:
    """Height and width that an image processor makes of a square image; None if it cannot be loaded.

    Args:
        location: folder or hub name of the image processor.
        name: the model's name.
    """
    from PIL import Image

    try:
        processor = load_processor(location, name)
    except ModelError:  # data from user code needs none
        return None
    made = processor.prepare([Image.new("RGB", (SQUARE, SQUARE))])
    return [int(side) for side in made["pixel_values"].shape[-2:]]
