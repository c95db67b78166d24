"""Source ``synthetic``: made inputs, for calibration where there is no data.

Images have the amplitude spectrum of natural images, texts are random tokens of the model's vocabulary
(``mlorq.data.noise``).
A few hundred real samples are better: benchmarks/README.md compares the inputs of layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
DETECTION_SHAPES = ((3, 480, 640), (3, 640, 480))  # of images for detectors, in turn


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


class _Given(NamedTuple):
    """What a source's ``load`` is given, without the role."""

    settings: SyntheticSettings
    model: ModelSettings
    folder: str
    samples: int
    seed: int


class SyntheticSource(DataSource[SyntheticSettings]):
    """Made images and texts."""

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
        assert settings.samples is not None
        given = _Given(settings, model, folder, settings.samples, seed if settings.seed is None else settings.seed)
        family = FAMILIES[model.family]
        described = family.image_inputs(model.own)
        texts = None if described is not None else family.text_inputs(model.own, folder)
        detector = None if described is not None or texts is not None else family.detector(model.own, folder)
        if settings.pairs and texts is None:
            raise DataError("source synthetic: pairs is for classifiers of texts; leave pairs out")
        if described is not None or texts is not None or detector is not None:
            if settings.shape is not None:
                raise DataError(f"source synthetic: family {model.family} has sizes of its own; leave shape out")
            if described is not None:
                return _classified(given, described)
            return _objects(given, detector) if texts is None else _texts(given, texts)
        if settings.shape is None:
            raise DataError(
                f"source synthetic: inputs of family {model.family} are unknown; give shape: [channels, height, width] "
                "if they are images, else use source custom"
            )
        return _shaped(given, settings.shape, settings.pixels or [0.0, 1.0])


def _classified(given: _Given, described: dict[str, Any]) -> Dataset:
    """Images of the size that a classifier takes, normalised as its library does."""
    size = described["input_size"]
    return _pixel_dataset(given, size, described["mean"], described["std"])


def _shaped(given: _Given, shape: list[int], pixels: list[float]) -> Dataset:
    """Images for a module of which nothing is known but the shape of its inputs."""
    black, white = pixels
    channels = shape[0]
    return _pixel_dataset(given, shape, [-black / (white - black)] * channels, [1 / (white - black)] * channels)


def _pixel_dataset(given: _Given, size: Any, mean: Any, std: Any) -> Dataset:
    from mlorq.artifacts.hashing import digest_batch, digest_json
    from mlorq.data.base import Dataset
    from mlorq.data.images import PixelBatches
    from mlorq.data.noise import natural_images

    batches = natural_images(given.samples, tuple(size), given.seed).split(given.settings.batch_size)
    mean, std = ([float(value) for value in row] for row in (mean, std))
    key = digest_json({"pixels": [digest_batch(batch) for batch in batches], "mean": mean, "std": std})
    return Dataset(PixelBatches(batches, mean, std), given.samples, key)


def _objects(given: _Given, detector: Any) -> Dataset:
    """Images for a detector, through its own preparation, every batch of one shape."""
    from PIL import Image

    from mlorq.data.memory import from_batches
    from mlorq.data.noise import natural_images

    batches = []
    for place, start in enumerate(range(0, given.samples, given.settings.batch_size)):
        count = min(given.settings.batch_size, given.samples - start)
        made = natural_images(count, DETECTION_SHAPES[place % len(DETECTION_SHAPES)], given.seed + place)
        batches.append(detector.prepare([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in made]))
    return from_batches(batches)


def _texts(given: _Given, inputs: Any) -> Dataset:
    """Texts of random tokens, tokenized as texts of other sources are."""
    from mlorq.data.noise import random_texts
    from mlorq.data.source import TextSettings
    from mlorq.data.texts import Rows, text_dataset

    settings = given.settings
    if settings.pairs and inputs.pairs:
        raise DataError("source synthetic: a sentence encoder takes single texts; leave pairs out")
    columns = 1 + settings.pairs
    longest = settings.max_length // columns
    made = random_texts(inputs.tokenizer(), columns * given.samples, longest, given.seed)
    texts = [made[column::columns] for column in range(columns)]
    rows = Rows("source synthetic", texts, None, str, range(1, given.samples + 1))
    own = TextSettings(batch_size=settings.batch_size, samples=given.samples, max_length=settings.max_length)
    # No labels, so no metric is computed; its name only decides how labels are read.
    return text_dataset(rows, own, "calibration", inputs, given.folder, given.seed, ["accuracy"])


SOURCES.register(SyntheticSource())
