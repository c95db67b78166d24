"""Made inputs for every kind of model, prepared as its library prepares real ones; see source ``synthetic``.

Batches of images for a library's own processor, and batches of recordings, have one shape each: some models take no
padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data import model_inputs
from mlorq.data.base import Dataset
from mlorq.data.images import PixelBatches
from mlorq.data.memory import from_batches
from mlorq.data.noise import natural_images, random_boxes, random_texts, texts_of_tokens
from mlorq.data.source import ModelSettings, TextSettings
from mlorq.data.speech_noise import SECONDS, speech_noise
from mlorq.errors import DataError
from mlorq.models.family import FAMILIES, TextInputs

if TYPE_CHECKING:
    from mlorq.data.synthetic import SyntheticSettings
    from mlorq.data.texts import Rows
    from mlorq.models.batches import Batch

SHAPES = ((3, 480, 640), (3, 640, 480))  # of images that a library's processor prepares, in turn
CHOICES = 4  # of a sample of multiple choice


class Given(NamedTuple):
    """What a source's ``load`` is given, without the role."""

    settings: SyntheticSettings
    model: ModelSettings
    folder: str
    samples: int
    seed: int

    def parts(self) -> Iterator[tuple[int, int]]:
        """Number and samples of each batch."""
        size = self.settings.batch_size
        for place, start in enumerate(range(0, self.samples, size)):
            yield place, min(size, self.samples - start)


def maker(given: Given, texts: TextInputs | None) -> Callable[[], Dataset] | None:
    """The function that makes the inputs of a model; None if it is not known what the model takes.

    Args:
        given: what ``load`` is given.
        texts: what the model needs of texts; None for a model that does not read texts alone.

    Raises:
        ModelError: a processor or tokenizer of the model cannot be loaded.
    """
    family, own, folder = FAMILIES[given.model.family], given.model.own, given.folder
    if texts is not None:
        return lambda: _texts(given, texts)
    if (described := family.image_inputs(own)) is not None:
        return lambda: _pixels(given, described["input_size"], described["mean"], described["std"])
    if (processor := family.image_processor(own, folder)) is not None:
        return lambda: _prepared(given, lambda images, _: processor.prepare(images))
    if (detector := family.detector(own, folder)) is not None:
        return lambda: _prepared(given, lambda images, _: detector.prepare(images))
    if (prompted := model_inputs.prompted(given.model, folder)) is not None:
        return lambda: _prepared(given, lambda images, seed: prompted.prepare(images, _boxes(images, seed))[0])
    if (towers := model_inputs.two_towers(given.model, folder)) is not None:
        return lambda: _prepared(given, lambda images, seed: _captioned(given, towers, images, seed))
    if (heard := family.recogniser(own, folder)) is not None:
        return lambda: _speech(given, heard)
    if (sounds := model_inputs.sound_classifier(given.model, folder)) is not None:
        return lambda: _recordings(given, sounds.rate, None, lambda values, _: sounds.prepare(values))
    return None


def shaped(given: Given, shape: list[int], pixels: list[float]) -> Dataset:
    """Images for a module of which nothing is known but the shape of its inputs and the values of black and white."""
    black, white = pixels
    channels = shape[0]
    return _pixels(given, shape, [-black / (white - black)] * channels, [1 / (white - black)] * channels)


def _pixels(given: Given, size: Any, mean: Any, std: Any) -> Dataset:
    """Images of the size that a model takes, normalised as its library does."""
    batches = natural_images(given.samples, tuple(size), given.seed).split(given.settings.batch_size)
    mean, std = ([float(value) for value in row] for row in (mean, std))
    key = digest_json({"pixels": [digest_batch(batch) for batch in batches], "mean": mean, "std": std})
    return Dataset(PixelBatches(batches, mean, std), given.samples, key)


def _prepared(given: Given, prepare: Callable[[list[Any], int], Batch]) -> Dataset:
    """Images that ``prepare`` makes batches of; it also gets a seed for what belongs to them."""
    from PIL import Image

    batches = []
    for place, count in given.parts():
        made = natural_images(count, SHAPES[place % len(SHAPES)], given.seed + place)
        images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in made]
        batches.append(prepare(images, given.seed + place))
    return from_batches(batches)


def _boxes(images: Sequence[Any], seed: int) -> list[list[tuple[float, ...]]]:
    """One box in each image."""
    return [[box] for box in random_boxes([image.size for image in images], seed)]


def _captioned(given: Given, towers: Any, images: list[Any], seed: int) -> Batch:
    """A batch of images and as many texts."""
    texts = random_texts(towers.tokenizer, len(images), given.settings.max_length, seed)
    return {**towers.images.prepare(images), **towers.tokenize(texts)}


def _speech(given: Given, heard: Any) -> Dataset:
    """Recordings for a recogniser; its decoder, if it has one, reads texts."""

    def prepare(values: list[Any], seed: int) -> Batch:
        length = given.settings.max_length
        texts = random_texts(heard.tokenizer, len(values), length, seed) if heard.decodes else None
        batch: Batch = heard.prepare(values, texts)
        return batch

    return _recordings(given, heard.rate, heard.longest, prepare)


def _recordings(given: Given, rate: int, longest: float | None, prepare: Callable[[list[Any], int], Batch]) -> Dataset:
    """Recordings of several lengths, none longer than ``longest`` seconds, that ``prepare`` makes batches of."""
    batches = []
    for place, count in given.parts():
        seconds = min(SECONDS[place % len(SECONDS)], longest or SECONDS[-1])
        batches.append(prepare(list(speech_noise(count, seconds, rate, given.seed + place)), given.seed + place))
    return from_batches(batches)


def _texts(given: Given, inputs: TextInputs) -> Dataset:
    """Texts of random tokens, in the form that the model's task reads."""
    from mlorq.data.texts import text_dataset

    settings = given.settings
    if settings.pairs and (inputs.pairs or inputs.predicts not in (None, "answers")):
        raise DataError("source synthetic: pairs is for classifiers of two texts; leave pairs out")
    own = TextSettings(batch_size=settings.batch_size, samples=given.samples, max_length=settings.max_length)
    if inputs.predicts in ("next", "masked"):
        from mlorq.data.language import language_dataset

        texts = texts_of_tokens(inputs.tokenizer(), given.samples * settings.max_length, given.seed)
        return language_dataset(texts, "source synthetic", own, "calibration", inputs, given.seed)
    if inputs.predicts == "target":
        from mlorq.data.targets import target_dataset

        rows = _rows(given, inputs, 2, settings.max_length)
        return target_dataset(rows, own, "calibration", inputs, given.folder, given.seed)
    if inputs.predicts == "choices":
        return _choices(given, own, inputs)
    columns = 2 if settings.pairs or inputs.predicts == "answers" else 1
    rows = _rows(given, inputs, columns, settings.max_length // columns)
    # No labels, so no metric is computed; its name only decides how labels are read.
    alike = replace(inputs, predicts=None)
    return text_dataset(rows, own, "calibration", alike, given.folder, given.seed, ["accuracy"])


def _choices(given: Given, own: TextSettings, inputs: TextInputs) -> Dataset:
    """A context with several choices in each sample."""
    from mlorq.data.choices import ChoiceRow
    from mlorq.data.multiple_choice import multiple_choice_dataset

    contexts, *choices = _rows(given, inputs, 1 + CHOICES, own.max_length // 2).texts
    rows = [
        ChoiceRow([context] * CHOICES, list(some), None, False, f"sample {number}")
        for number, (context, *some) in enumerate(zip(contexts, *choices, strict=True), 1)
    ]
    return multiple_choice_dataset(rows, own, "calibration", inputs)


def _rows(given: Given, inputs: TextInputs, columns: int, longest: int) -> Rows:
    """Rows of texts of at most ``longest`` tokens, with special ones."""
    from mlorq.data.texts import Rows

    made = random_texts(inputs.tokenizer(), columns * given.samples, longest, given.seed)
    texts = [made[column::columns] for column in range(columns)]
    return Rows("source synthetic", texts, None, str, range(1, given.samples + 1))
