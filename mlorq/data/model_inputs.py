"""Input requirements of a model, from its family: image preprocessing, tokenizers, class names, detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mlorq.errors import DataError
from mlorq.models.family import FAMILIES, InputKind, TextInputs, takers

if TYPE_CHECKING:
    from mlorq.data.source import ModelSettings
    from mlorq.models.detector import Detector


Found = TypeVar("Found")


def image_inputs(model: ModelSettings, source: str) -> dict[str, Any]:
    """Image preprocessing of a classifier: input size, interpolation, mean, std, crop.

    Raises:
        DataError: the model does not take images.
    """
    return required(FAMILIES[model.family].image_inputs(model.own), source, "images")


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


def required(found: Found | None, source: str, kind: InputKind) -> Found:
    """``found``, unless it is None.

    Raises:
        DataError: it is None: the model does not take this kind of inputs. The source and the fitting families are
            named.
    """
    if found is None:
        raise DataError(f"source {source} is for models of {takers(kind)}; use source custom for others")
    return found
