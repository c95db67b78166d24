"""Input requirements of a model, from its family: preprocessing, tokenizers, class names, detectors, recognisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mlorq.errors import DataError
from mlorq.models.family import FAMILIES, TextInputs, takers
from mlorq.models.tasks import InputKind

if TYPE_CHECKING:
    from mlorq.data.source import ModelSettings
    from mlorq.models.detector import Detector
    from mlorq.models.recogniser import Recogniser


Found = TypeVar("Found")


@dataclass(frozen=True)
class ImageInputs:
    """Preprocessing of images.

    Attributes:
        described: timm's settings (input size, interpolation, mean, std, crop), or those of ``prepare``.
        prepare: a batch from images of Pillow; None: timm's transform.
        features: whether the model's outputs are features, not scores of classes.
    """

    described: dict[str, Any]
    prepare: Callable[[Sequence[Any]], Any] | None = None
    features: bool = False


def image_inputs(model: ModelSettings, folder: str, source: str) -> ImageInputs:
    """Image preprocessing of a classifier or encoder.

    Raises:
        DataError: the model does not take images.
        ModelError: its image processor cannot be loaded.
    """
    family = FAMILIES[model.family]
    features = family.features(model.own)
    described = family.image_inputs(model.own)
    if described is not None:
        return ImageInputs(described, None, features)
    processor = required(family.image_processor(model.own, folder), source, "images")
    return ImageInputs(processor.described, processor.prepare, features)


def text_inputs(model: ModelSettings, folder: str, source: str) -> TextInputs:
    """Tokenizer, kind and class names of a text model.

    Raises:
        DataError: the model does not take texts.
    """
    return required(FAMILIES[model.family].text_inputs(model.own, folder), source, "texts")


def detector(model: ModelSettings, folder: str, source: str) -> Detector:
    """A detector's conversion of images to batches and of outputs to detections.

    Raises:
        DataError: the model is not a detector.
    """
    return required(FAMILIES[model.family].detector(model.own, folder), source, "objects")


def recogniser(model: ModelSettings, folder: str, source: str, language: str | None = None) -> Recogniser:
    """A recogniser's preparation of recordings and the texts that it hears in them.

    Raises:
        DataError: the model does not recognise speech.
        ModelError: a part of it cannot be loaded, or it does not take a language.
    """
    return required(FAMILIES[model.family].recogniser(model.own, folder, language), source, "speech")


def required(found: Found | None, source: str, kind: InputKind) -> Found:
    """``found``, unless it is None.

    Raises:
        DataError: it is None: the model does not take this kind of inputs. The source and the fitting families are
            named.
    """
    if found is None:
        raise DataError(f"source {source} is for models of {takers(kind)}; use source custom for others")
    return found
