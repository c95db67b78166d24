"""Images with texts, for models of two towers: batches of both, and metrics of their common space of embeddings.

Images with classes get the prompt of their class as their text, and evaluation measures zero-shot classification with
the prompts of all classes. Images with captions are measured by recall in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fsspec.core import url_to_fs
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_batch, digest_bytes, digest_json
from mlorq.artifacts.locations import resolve_location
from mlorq.data.base import Dataset
from mlorq.data.contents import contents, text_of
from mlorq.data.images import Image, PreparedBatches
from mlorq.data.metrics import RECALL, ZERO_SHOT, first_recalls, zero_shot_accuracy
from mlorq.data.source import Role
from mlorq.errors import DataError
from mlorq.models.batches import move_batch
from mlorq.models.two_towers import TwoTowers, image_embedding, text_embedding


class CaptionedBatches(PreparedBatches):
    """Batches of images, prepared on first use, each with its text.

    Args:
        images: the images of all batches.
        texts: the text of each image.
        towers: the model's preparation.
        size: images per batch.
    """

    def __init__(self, images: Sequence[Image], texts: Sequence[str], towers: TwoTowers, size: int) -> None:
        super().__init__(images, towers.images.prepare, size)
        self.tokens = token_batches(texts, towers, size)

    def _batch(self, place: int) -> dict[str, Tensor]:
        return {**super()._batch(place), **self.tokens[place]}


def token_batches(texts: Sequence[str], towers: TwoTowers, size: int) -> list[dict[str, Tensor]]:
    """Texts as batches of tokens, in order."""
    return [towers.tokenize(texts[start : start + size]) for start in range(0, len(texts), size)]


def check_metric(metric: str | None, usual: str, kind: str) -> None:
    """Refuse a metric that is not the one of the data.

    Args:
        metric: the configured one; None: the usual one.
        usual: the only one that fits.
        kind: what the images have, for the error.

    Raises:
        DataError: it is another one.
    """
    if metric not in (None, usual):
        raise DataError(f"metric {metric!r} does not fit a model of two towers and images with {kind}; choose {usual}")


def class_names(location: str | None, folder: str, folders: Sequence[str], origin: str) -> list[str]:
    """Names of the classes by number, for prompts.

    Args:
        location: text file with a name per line; None: the names of the folders, with spaces for underscores.
        folder: base of relative paths.
        folders: names of the folders that are the classes; empty if there are none.
        origin: the data set's name in errors.

    Raises:
        DataError: there are no names, or not as many as folders.
    """
    if location is None:
        if not folders:
            raise DataError(
                f"{origin}: the names of the classes are unknown: give class_names, or a folder per class; images with "
                "texts of their own are for source captions"
            )
        return [name.replace("_", " ") for name in folders]
    place = resolve_location(location, folder)
    fs, path = url_to_fs(place)
    shown = f"class names {place}"
    lines = text_of(contents(fs, path, shown, "do not exist"), shown).splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"class names {place} are empty")
    if folders and len(names) != len(folders):
        raise DataError(f"class names {place}: {len(names)} names, but {origin} has {len(folders)} folders")
    return names


def zero_shot_dataset(
    images: Sequence[Image],
    names: Sequence[str],
    prompts: Sequence[str],
    batch_size: int,
    role: Role,
    towers: TwoTowers,
) -> Dataset:
    """Images with classes; the text of an image is the first prompt with the name of its class.

    Args:
        images: the chosen images, which have labels.
        names: names of the classes by number.
        prompts: templates with ``{}`` in the place of a name.
        batch_size: samples per forward pass.
        role: calibration or evaluation; the latter has the metric ``zero_shot``.
        towers: the model's preparation.

    Raises:
        DataError: an image has no label, or a label no name.
    """
    for image in images:
        if image.label is None:
            raise DataError(f"image {image.name} has no class: put images into a folder per class, or give labels")
        if not 0 <= image.label < len(names):
            raise DataError(f"{image.where}: label {image.label} has no name: there are {len(names)} class names")
    labels = [image.label for image in images if image.label is not None]
    batches = CaptionedBatches(images, [filled(prompts[0], names[label]) for label in labels], towers, batch_size)
    described = _described(batches, images, towers, batch_size)
    if role == "calibration":
        return Dataset(batches, len(images), digest_json(described))
    texts = [filled(prompt, name) for name in names for prompt in prompts]
    tokens = token_batches(texts, towers, batch_size)
    described |= {"metric": ZERO_SHOT, "labels": labels, "classes": [digest_batch(batch) for batch in tokens]}
    evaluate = _ZeroShot(batches, np.array(labels), tokens, len(names))
    return Dataset(batches, len(images), digest_json(described), ZERO_SHOT, evaluate=evaluate)


def filled(prompt: str, name: str) -> str:
    """A prompt with the name of a class; other braces stay."""
    return prompt.replace("{}", name)


def caption_dataset(
    images: Sequence[Image], captions: Sequence[str], batch_size: int, role: Role, towers: TwoTowers
) -> Dataset:
    """Images with captions; an image or a caption may occur in several samples.

    Args:
        images: the image of each sample; equal names are one image.
        captions: the caption of each sample.
        batch_size: samples per forward pass.
        role: calibration or evaluation; the latter has the metric ``recall``.
        towers: the model's preparation.
    """
    batches = CaptionedBatches(images, captions, towers, batch_size)
    described = _described(batches, images, towers, batch_size)
    if role == "calibration":
        return Dataset(batches, len(images), digest_json(described))
    numbers = [_numbers([image.name for image in images]), _numbers(captions)]
    described |= {"metric": RECALL, "pairs": numbers}
    return Dataset(batches, len(images), digest_json(described), RECALL, _Recall(np.array(numbers)))


def _numbers(names: Sequence[str]) -> list[int]:
    """The number of each name among the different ones, in the order in which they occur."""
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in names]


def _described(batches: CaptionedBatches, images: Sequence[Image], towers: TwoTowers, size: int) -> dict[str, Any]:
    return {
        "images": [digest_bytes(image.data) for image in images],
        "texts": [digest_batch(tokens) for tokens in batches.tokens],
        "preprocessing": towers.images.described,
        "batch_size": size,
    }


@dataclass(frozen=True)
class _ZeroShot:
    """Zero-shot accuracy of a module on all images."""

    batches: Sequence[Any]
    labels: np.ndarray
    tokens: Sequence[Any]  # of all prompts of all classes, class by class
    classes: int

    def __call__(self, module: nn.Module) -> dict[str, float]:
        floating = next(value for value in module.parameters() if value.is_floating_point())

        def embedded(function: Any, batches: Sequence[Any]) -> np.ndarray:
            with torch.no_grad():
                found = [function(module, move_batch(one, floating.device, floating.dtype)).cpu() for one in batches]
            joined: np.ndarray = torch.cat(found).numpy()
            return joined

        images, prompts = embedded(image_embedding, self.batches), embedded(text_embedding, self.tokens)
        prompts = prompts.reshape(self.classes, -1, prompts.shape[1])
        return {ZERO_SHOT: zero_shot_accuracy(images, prompts, self.labels)}


@dataclass(frozen=True)
class _Recall:
    """Recall at 1 in both directions, and their mean."""

    numbers: np.ndarray  # (2, samples): of the image and of the caption of each sample

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        values = outputs.numpy()
        width = values.shape[1] // 2
        first = [np.unique(row, return_index=True)[1] for row in self.numbers]
        found, back = first_recalls(values[first[0], :width], values[first[1], width:], self.numbers.T)
        return {RECALL: (found + back) / 2, "image_to_text": found, "text_to_image": back}
