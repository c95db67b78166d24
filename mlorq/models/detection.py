"""The family of Mask R-CNN detectors with a Swin backbone and published weights; see ``mask_rcnn.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.models.family import Example, LibrarySettings, ModelFamily
from mlorq.models.tasks import InputKind

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.base import FloatModel
    from mlorq.models.batches import Batch
    from mlorq.models.detector import Detector

NAME = "detection"


class DetectionSettings(LibrarySettings):
    """Settings of a detector and its weights."""

    checkpoint: str | None = Field(None, description="fsspec URI of a safetensors or PyTorch state dict")
    pretrained: bool = Field(False, description="fetch the weights from the family's hub")

    def check(self) -> None:
        """Check that there are a name and a checkpoint.

        Raises:
            ValueError: ``name`` or ``checkpoint`` is missing, or ``pretrained`` is set.
        """
        self.require_name(NAME)
        if self.pretrained or not self.checkpoint:
            raise ValueError(f"family {NAME} cannot fetch weights: give checkpoint: URI, without pretrained")


class Detection(ModelFamily[DetectionSettings]):
    """Detectors of torchvision with backbones from timm."""

    name = NAME
    settings = DetectionSettings
    rebuilds = True
    inputs: ClassVar[Mapping[InputKind, str]] = {"objects": ""}

    def load(self, settings: DetectionSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """The detector with the weights of its checkpoint.

        Raises:
            ModelError: the name or an argument is unknown, or the weights are missing or do not fit.
        """
        from mlorq.models.mask_rcnn import load

        location = resolve_location(settings.checkpoint or "", folder)
        return load(settings.require_name(NAME), settings.arguments, location, dtype)

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The module of an architecture, with weights yet to be loaded.

        Raises:
            ModelError: the name or an argument is unknown.
        """
        from mlorq.models.mask_rcnn import rebuild

        return rebuild(architecture)

    def example(self) -> Example:
        """The smaller detector, on COCO."""

        def images(part: str) -> dict[str, Any]:
            return {"source": "coco", "root": f"{part}/", "annotations": f"instances_{part}.json", "batch_size": 2}

        return Example(
            {"name": "mask_rcnn_swin_tiny", "checkpoint": "weights.pth"},
            {"calibration": images("train2017") | {"samples": 64}, "evaluation": images("val2017")},
        )

    def detector(self, settings: DetectionSettings, folder: str = "") -> Detector:
        """Inference as in torchvision."""
        from mlorq.models.mask_rcnn import detector

        return detector(settings.require_name(NAME), settings.arguments)

    def preprocess(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Input sizes, normalisation and padding of images."""
        from mlorq.models.mask_rcnn import preprocessing

        described = preprocessing(architecture["name"], architecture["arguments"])
        return {"kind": "image", "inputs": ["pixel_values", "image_sizes"], **described}

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Batch:
        """Random pixels of square images."""
        from mlorq.models.mask_rcnn import random_images

        return random_images(architecture["name"], architecture["arguments"], samples)

    def exported_part(self, architecture: Mapping[str, Any], batch: Batch) -> tuple[str, Batch]:
        """The backbone with its pyramid: the number of proposals depends on the image."""
        return "backbone", batch["pixel_values"]

    def locations(self, settings: DetectionSettings) -> list[str]:
        """The checkpoint."""
        return [settings.checkpoint] if settings.checkpoint else []
