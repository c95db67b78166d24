"""Source ``coco``: images with COCO instance annotations, for detectors and for models that boxes prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mlorq.data import model_inputs
from mlorq.data.packages import PYCOCOTOOLS, OptionalPackage
from mlorq.data.source import (
    SOURCES,
    BatchSettings,
    DataSource,
    MetricSettings,
    ModelSettings,
    Role,
    RootSettings,
    SamplesSettings,
)

if TYPE_CHECKING:
    from mlorq.data.base import Dataset


class CocoSettings(BatchSettings, SamplesSettings, MetricSettings, RootSettings):
    """Keys of images with COCO annotations."""

    annotations: str | None = Field(None, description="JSON file of COCO instances, local path or fsspec URL")


class CocoSource(DataSource[CocoSettings]):
    """Images with COCO annotations; pycocotools computes the metrics."""

    name = "coco"
    settings = CocoSettings
    needed = ("root", "annotations")
    package = PYCOCOTOOLS

    def locations(self, settings: CocoSettings) -> Sequence[str | None]:
        """The images and the annotations."""
        return settings.root, settings.annotations

    def requires(self, settings: CocoSettings, role: Role) -> OptionalPackage | None:
        """The package of the metrics, for evaluation data."""
        return PYCOCOTOOLS if role == "evaluation" else None

    def load(self, settings: CocoSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load images as batches for a detector, with box AP and mask AP, or with boxes as prompts, with mask IoU.

        See ``DataSource.load``.
        """
        from mlorq.data.coco_images import coco_dataset
        from mlorq.data.coco_prompts import prompt_dataset

        if (prompted := model_inputs.prompted(model, folder)) is not None:
            return prompt_dataset(settings, prompted, role, folder, seed)

        detector = model_inputs.detector(model, folder, self.name)
        return coco_dataset(settings, detector, role, model, folder, seed)


SOURCES.register(CocoSource())
