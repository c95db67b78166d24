"""Source ``synthetic``: made inputs, for calibration where there is no data.

Images have the amplitude spectrum of natural images, texts are random tokens of the model's vocabulary
(``mlorq.data.noise``), recordings have the spectrum and rhythm of speech (``mlorq.data.speech_noise``).
A few hundred real samples are better: benchmarks/README.md compares the inputs of layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mlorq.data.source import (
    SOURCES,
    BatchSettings,
    DataSource,
    LengthSettings,
    ModelSettings,
    RefusedElsewhere,
    Role,
    SamplesSettings,
)
from mlorq.errors import DataError
from mlorq.models.family import FAMILIES

if TYPE_CHECKING:
    from mlorq.data.base import Dataset

NAME = "synthetic"


class SyntheticSettings(LengthSettings, BatchSettings, SamplesSettings):
    """Keys of made inputs."""

    seed: Annotated[int | None, RefusedElsewhere()] = Field(
        None, ge=0, description="seed of the inputs; default: the run's"
    )
    pairs: Annotated[bool, RefusedElsewhere()] = Field(
        False, description="two texts per sample, for a classifier of pairs of texts"
    )
    shape: Annotated[list[int] | None, RefusedElsewhere()] = Field(
        None, description="images for a custom model: [channels, height, width]"
    )
    pixels: Annotated[list[float] | None, RefusedElsewhere()] = Field(
        None, description="with shape: values of black and white; default: [0, 1]"
    )

    def check(self) -> None:
        """Check the shape of images and the values of pixels.

        Raises:
            ValueError: a list has another length, or values that cannot be.
        """
        super().check()
        if self.shape is not None and (len(self.shape) != 3 or min(self.shape) < 1):
            raise ValueError(f"shape {self.shape} must be [channels, height, width]")
        if self.pixels is not None and (len(self.pixels) != 2 or self.pixels[0] >= self.pixels[1]):
            raise ValueError(f"pixels {self.pixels} must be [value of black, value of white]")
        if self.pixels is not None and self.shape is None:
            raise ValueError("pixels needs shape: [channels, height, width]")


class SyntheticSource(DataSource[SyntheticSettings]):
    """Made images, texts and recordings."""

    name = NAME
    settings = SyntheticSettings
    needed = ("samples",)

    def check_role(self, settings: SyntheticSettings, role: Role) -> None:
        """Refuse evaluation: made inputs have no labels."""
        if role == "evaluation":
            raise ValueError("source synthetic is for calibration: made inputs have no labels; choose another source")

    def load(self, settings: SyntheticSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Make inputs of the kind that the model takes; see ``DataSource.load``.

        Raises:
            DataError: the model's inputs are unknown, or a key is for other kinds of models.
        """
        from mlorq.data.synthetic_inputs import Given, maker, shaped

        assert settings.samples is not None
        given = Given(settings, model, folder, settings.samples, seed if settings.seed is None else settings.seed)
        family = FAMILIES[model.family]
        texts = family.text_inputs(model.own, folder)
        if settings.pairs and texts is None:
            raise DataError("source synthetic: pairs is for classifiers of texts; leave pairs out")
        make = maker(given, texts)
        if make is not None:
            if settings.shape is not None:
                raise DataError(f"source synthetic: family {model.family} has sizes of its own; leave shape out")
            return make()
        if settings.shape is None:
            raise DataError(
                f"source synthetic: inputs of family {model.family} are unknown; give shape: [channels, height, width] "
                "if they are images, else use source custom"
            )
        return shaped(given, settings.shape, settings.pixels or [0.0, 1.0])


SOURCES.register(SyntheticSource())
