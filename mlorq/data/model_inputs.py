"""What a model needs of its inputs, from its family: preprocessing, tokenizers, class names, detectors, recognisers."""

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
    from mlorq.models.mask_generation import Prompted
    from mlorq.models.recogniser import Recogniser
    from mlorq.models.transformers_sounds import SoundClassifier
    from mlorq.models.two_towers import TwoTowers


Found = TypeVar("Found")


@dataclass(frozen=True)
class ImageInputs:
    """Preprocessing of images.

    Attributes:
        described: timm's settings (input size, interpolation, mean, std, crop), or those of ``prepare``.
        prepare: a batch from images of Pillow; None: timm's transform.
        features: whether the model's outputs are features, not scores of classes.
        maps: whether they are maps, scores of classes at every position.
        depths: whether they are depths at every position.
        processor: the image processor of transformers that ``prepare`` calls.
    """

    described: dict[str, Any]
    prepare: Callable[[Sequence[Any]], Any] | None = None
    features: bool = False
    maps: bool = False
    depths: bool = False
    processor: Any = None


def image_inputs(
    model: ModelSettings, folder: str, source: str, kinds: Sequence[InputKind] = ("images",)
) -> ImageInputs:
    """Image preprocessing of a classifier, an encoder or a model of segmentation.

    Args:
        model: the ``model`` section.
        folder: base of relative paths.
        source: name of the data source, for errors.
        kinds: the kinds of inputs that the source has, for errors.

    Raises:
        DataError: the model does not take images.
        ModelError: its image processor cannot be loaded.
    """
    family = FAMILIES[model.family]
    features = family.features(model.own)
    described = family.image_inputs(model.own)
    if described is not None:
        return ImageInputs(described, None, features, family.maps(model.own))
    processor = required(family.image_processor(model.own, folder), source, *kinds)
    kinds_of_maps = family.maps(model.own), family.depths(model.own)
    return ImageInputs(processor.described, processor.prepare, features, *kinds_of_maps, processor.processor)


def two_towers(model: ModelSettings, folder: str) -> TwoTowers | None:
    """Preparation of images with texts; None if the model does not embed both.

    Raises:
        ModelError: its image processor or tokenizer cannot be loaded.
    """
    return FAMILIES[model.family].two_towers(model.own, folder)


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
    return required(FAMILIES[model.family].detector(model.own, folder), source, "objects", "prompted")


def prompted(model: ModelSettings, folder: str) -> Prompted | None:
    """Preparation and inference of a model that masks what boxes enclose; None for other models.

    Raises:
        ModelError: its processor cannot be loaded.
    """
    return FAMILIES[model.family].prompted(model.own, folder)


def recogniser(model: ModelSettings, folder: str, source: str, language: str | None = None) -> Recogniser:
    """A recogniser's preparation of recordings and the texts that it hears in them.

    Raises:
        DataError: the model does not recognise speech.
        ModelError: a part of it cannot be loaded, or it does not take a language.
    """
    return required(FAMILIES[model.family].recogniser(model.own, folder, language), source, "speech", "sounds")


def sound_classifier(model: ModelSettings, folder: str) -> SoundClassifier | None:
    """A classifier's preparation of recordings; None for other models.

    Raises:
        ModelError: its feature extractor cannot be loaded.
    """
    return FAMILIES[model.family].sound_classifier(model.own, folder)


def required(found: Found | None, source: str, *kinds: InputKind) -> Found:
    """``found``, unless it is None.

    Raises:
        DataError: it is None: the model takes none of these kinds of inputs. The source and the fitting families
            are named.
    """
    if found is None:
        raise DataError(f"source {source} is for models of {takers(*kinds)}; use source custom for others")
    return found
