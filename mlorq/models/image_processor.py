"""Image processors of transformers: from images to batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlorq.errors import ModelError, one_line

if TYPE_CHECKING:
    from mlorq.models.batches import Batch

# Entries of an image processor that do not affect the batches.
NOT_PREPROCESSING = ("_processor_class", "image_processor_type", "processor_class")


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
        raise ModelError(f"model {name!r}: its image processor cannot be loaded: {one_line(error)}") from error

    def prepare(images: Sequence[Any]) -> Batch:
        found = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return {key: found[key] for key in keys if key in found}

    described = json.loads(processor.to_json_string())
    described = {key: value for key, value in described.items() if key not in NOT_PREPROCESSING}
    return ImageProcessor(prepare, described, processor)
