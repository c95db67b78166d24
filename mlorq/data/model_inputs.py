"""What sources ask of the model's family: preprocessing of images, tokenizers, names of classes, detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mlorq.errors import DataError
from mlorq.models.family import FAMILIES, InputKind, TextInputs, takers

if TYPE_CHECKING:
    from mlorq.data.source import ModelSettings
    from mlorq.models.detector import Detector


Found = TypeVar("Found")


def image_inputs(model: ModelSettings, source: str) -> dict[str, Any]:
    """Preprocessing of an image classifier's inputs: input size, interpolation, mean, std, crop.

    Raises:
        DataError: the model does not take images; the source is named.
    """
    return required(FAMILIES[model.family].image_inputs(model.own), source, "images")


def text_inputs(model: ModelSettings, folder: str, source: str) -> TextInputs:
    """How the model reads texts.

    Raises:
        DataError: it does not; the source is named.
    """
    return required(FAMILIES[model.family].text_inputs(model.own, folder), source, "texts")


def detector(model: ModelSettings, folder: str, source: str) -> Detector:
    """How images become batches of a detector, and its outputs detections.

    Raises:
        DataError: the model is not a detector; the source is named.
    """
    return required(FAMILIES[model.family].detector(model.own, folder), source, "objects")


def required(found: Found | None, source: str, kind: InputKind) -> Found:
    """What a model's family says of a kind of inputs.

    Raises:
        DataError: the model does not take them; the families that do are named.
    """
    if found is None:
        raise DataError(f"source {source} is for models of {takers(kind)}; use source custom for others")
    return found
