"""What sources ask of the model's family: preprocessing of images, tokenizers, names of classes, detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from mlorq.errors import DataError

if TYPE_CHECKING:
    from mlorq.data.source import ModelSettings
    from mlorq.models.detector import Detector

OTHERS = "use source custom for others"


def require_image_classifier(model: ModelSettings, source: str) -> None:
    """Refuse models that take no images as timm prepares them.

    Raises:
        DataError: names the source.
    """
    if model.family != "timm":
        raise DataError(f"source {source} is for models of family timm; {OTHERS}")


def require_text_model(model: ModelSettings, source: str) -> None:
    """Refuse models without a tokenizer.

    Raises:
        DataError: names the source.
    """
    if model.family != "transformers":
        raise DataError(f"source {source} is for models of family transformers; {OTHERS}")


def embeds_texts(model: ModelSettings) -> bool:
    """Whether the model is a sentence encoder, whose samples are single texts and whose labels are of pairs."""
    return model.task == "sentence-similarity"


def preprocessing(model: ModelSettings) -> dict[str, Any]:
    """timm's preprocessing of an image classifier: input size, interpolation, mean, std, crop."""
    from mlorq.models import timm

    return timm.preprocessing(cast(Any, model))


def tokenizer(model: ModelSettings, folder: str) -> Any:
    """The tokenizer of a text model."""
    from mlorq.models import transformers

    return transformers.tokenizer(cast(Any, model), folder)


def class_names(model: ModelSettings, folder: str) -> list[str]:
    """The class names of a text classifier, in the order of its outputs; a regressor has one."""
    from mlorq.models import transformers

    return transformers.class_names(cast(Any, model), folder)


def detector(model: ModelSettings, folder: str, source: str) -> Detector:
    """How images become batches of a detector, and its outputs detections.

    Raises:
        DataError: the model is not a detector.
    """
    from mlorq.models import detection, transformers, transformers_detection

    if model.family == "detection":
        return detection.detector(cast(Any, model))
    if model.family == "transformers" and model.task in transformers_detection.TASKS:
        settings = cast(Any, model)
        return transformers_detection.detector(settings, transformers.locate(settings, folder))
    raise DataError(
        f"source {source} is for models of family detection, and of family transformers with task object-detection or "
        f"instance-segmentation; {OTHERS}"
    )
