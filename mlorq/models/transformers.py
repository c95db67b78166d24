"""The family of models from transformers: of images, texts and speech."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mlorq.artifacts.locations import is_remote, resolve_location
from mlorq.errors import ModelError
from mlorq.models.family import DerivedOutput, Example, LibrarySettings, ModelFamily, TextInputs
from mlorq.models.family import load as load
from mlorq.models.hub_names import is_hub_name, load_problem
from mlorq.models.tasks import (
    ANSWERS,
    CHOICES,
    CLASSES,
    DEPTHS,
    FEATURES,
    MAPS,
    MASKED,
    NEXT,
    PAIRS,
    SOUNDS,
    TAGS,
    TARGETS,
    TASKS,
    InputKind,
    tasks_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlorq.models.base import FloatModel
    from mlorq.models.batches import Batch
    from mlorq.models.detector import Detector
    from mlorq.models.image_processor import ImageProcessor
    from mlorq.models.mask_generation import Prompted
    from mlorq.models.recogniser import Recogniser
    from mlorq.models.transformers_sounds import SoundClassifier
    from mlorq.models.two_towers import TwoTowers

NAME = "transformers"
MODEL_NAME = "model.name"  # key of a configuration
PREDICTED: dict[str, Literal["next", "masked", "target", "tags", "answers", "choices"]] = {
    NEXT: "next",
    MASKED: "masked",
    TARGETS: "target",
    TAGS: "tags",
    ANSWERS: "answers",
    CHOICES: "choices",
}


class TransformersSettings(LibrarySettings):
    """Settings of a model from transformers; its name is also the location of its weights."""

    def check(self) -> None:
        """Check the name and the task.

        Raises:
            ValueError: ``name`` is missing, or ``task`` is missing or not supported.
        """
        self.require_name(NAME)
        if self.task is None:
            raise ValueError(f"family {NAME} needs task: {', '.join(TASKS)}")

    @property
    def inputs(self) -> InputKind:
        """The kind of the model's inputs."""
        return TASKS[self.task or CLASSES].inputs


class Transformers(ModelFamily[TransformersSettings]):
    """Models of texts, of images, of both and of speech: encoders, classifiers, language models, detectors."""

    name = NAME
    settings = TransformersSettings
    rebuilds = True
    inputs: ClassVar[Mapping[InputKind, str]] = {
        "texts": f"with task {tasks_of('texts')}",
        "language": f"with task {tasks_of('language')}",
        "targets": f"with task {tasks_of('targets')}",
        "speech": f"with task {tasks_of('speech')}",
        "sounds": f"with task {tasks_of('sounds')}",
        "images": f"with task {tasks_of('images')}",
        "objects": f"with task {tasks_of('objects')}",
        "prompted": f"with task {tasks_of('prompted')}",
        "captioned": f"with task {tasks_of('captioned')}",
    }

    def load(self, settings: TransformersSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """The model with its weights, from a folder, a folder inside a package, or the hub.

        Raises:
            ModelError: the model does not exist, or its weights do not fit.
        """
        from mlorq.models.transformers_modules import load

        return load(settings, dtype, folder)

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The module of an architecture, with weights yet to be loaded.

        Raises:
            CheckpointError: the installed version of transformers does not have the model class, or the description
                says something that is not allowed.
        """
        from mlorq.models.transformers_rebuild import rebuild

        return rebuild(architecture)

    def describe(self, module: nn.Module) -> dict[str, Any] | None:
        """The architecture of an instance of a class from transformers; None for other modules."""
        from mlorq.models.transformers_modules import describe

        return describe(module)

    def mark(self, module: nn.Module) -> None:
        """Set ``samples_axis = 1`` on layers whose input has tokens first and samples second."""
        from mlorq.models.transformers_detection import mark_samples

        mark_samples(module)

    def classes(self, model: FloatModel) -> int | None:
        """``num_labels`` of a classifier (of texts, images or recordings) or a segmentation; None for other tasks."""
        if model.architecture.get("task") not in (CLASSES, "image-classification", MAPS, SOUNDS):
            return None
        return int(model.module.config.num_labels)  # type: ignore[union-attr, arg-type]

    def example(self) -> Example:
        """A text classifier in a folder."""
        table = {"source": "table", "text": ["sentence"]}
        return Example(
            {"name": "my_model/", "task": CLASSES},
            {
                "calibration": table | {"path": "train.tsv", "samples": 256},
                "evaluation": table | {"path": "dev.tsv", "label": "label"},
            },
            named="PATH",
        )

    def text_inputs(self, settings: TransformersSettings, folder: str = "") -> TextInputs | None:
        """Tokenizer and classes of the model; None for models of images and speech."""
        if settings.inputs not in ("texts", "language", "targets"):
            return None
        return TextInputs(
            partial(tokenizer, settings, folder),
            partial(class_names, settings, folder),
            settings.task == PAIRS,
            PREDICTED.get(settings.task or ""),
            partial(decoder_shift, settings, folder) if settings.inputs == "targets" else None,
        )

    def image_processor(self, settings: TransformersSettings, folder: str = "") -> ImageProcessor | None:
        """The image processor of a classifier, an encoder or a model of maps; None for other models."""
        if settings.inputs != "images":
            return None
        from mlorq.models.image_processor import load_processor

        with quiet():
            return load_processor(locate(settings, folder), settings.name or "")

    def features(self, settings: TransformersSettings) -> bool:
        """Whether the task is to encode images."""
        return settings.task == FEATURES

    def maps(self, settings: TransformersSettings) -> bool:
        """Whether the task is semantic segmentation."""
        return settings.task == MAPS

    def depths(self, settings: TransformersSettings) -> bool:
        """Whether the task is depth estimation."""
        return settings.task == DEPTHS

    def two_towers(self, settings: TransformersSettings, folder: str = "") -> TwoTowers | None:
        """Image processor and tokenizer of a model of two towers; None for other tasks."""
        if settings.inputs != "captioned":
            return None
        from mlorq.models.two_towers import two_towers

        with quiet():
            return two_towers(settings, locate(settings, folder))

    def detector(self, settings: TransformersSettings, folder: str = "") -> Detector | None:
        """Image processor and post-processing of the model; None for text models."""
        if settings.inputs != "objects":
            return None
        from mlorq.models.transformers_detection import detector

        return detector(settings, locate(settings, folder))

    def prompted(self, settings: TransformersSettings, folder: str = "") -> Prompted | None:
        """Processor of a model that masks what boxes enclose; None for other models."""
        if settings.inputs != "prompted":
            return None
        from mlorq.models.mask_generation import prompted

        with quiet():
            return prompted(settings, locate(settings, folder))

    def recogniser(
        self, settings: TransformersSettings, folder: str = "", language: str | None = None
    ) -> Recogniser | None:
        """Feature extractor, tokenizer and decoding of a model of speech; None for other models."""
        if settings.inputs != "speech":
            return None
        from mlorq.models.transformers_speech import recogniser

        return recogniser(settings, locate(settings, folder), language)

    def sound_classifier(self, settings: TransformersSettings, folder: str = "") -> SoundClassifier | None:
        """Feature extractor and class names of a classifier of recordings; None for other models."""
        if settings.inputs != "sounds":
            return None
        from mlorq.models.transformers_sounds import sound_classifier

        return sound_classifier(settings, locate(settings, folder), folder)

    def preprocess(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a batch, with the vocabulary size and maximum length of texts or the size of images."""
        from mlorq.models.transformers_inputs import described_inputs

        return described_inputs(architecture)

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Batch:
        """Random tokens, pixels or recordings, from a fixed seed."""
        from mlorq.models.transformers_inputs import random_inputs

        return random_inputs(architecture, samples)

    def derived_outputs(self, architecture: Mapping[str, Any]) -> dict[str, DerivedOutput]:
        """The sentence embedding, for encoders whose module is the transformer alone."""
        if architecture.get("task") != PAIRS or "dense" in architecture:
            return {}
        from mlorq.models.sentence import SentenceEmbedding

        embedding = SentenceEmbedding.of_architecture(architecture)

        def embed(inputs: Mapping[str, Tensor], output: Any) -> Tensor:
            return embedding.embed(output.last_hidden_state, inputs["attention_mask"])

        return {"sentence_embedding": embed}

    def locations(self, settings: TransformersSettings) -> list[str]:
        """The name of the model, which can be a folder."""
        return [settings.name] if settings.name else []

    def local_paths(self, settings: TransformersSettings, folder: str = "") -> list[str]:
        """The folder of the model, which can be inside an installed package; empty for a hub name."""
        location = locate(settings, folder)
        return [location] if os.path.isabs(location) else []

    def uses_hub(self, settings: TransformersSettings, folder: str = "") -> bool:
        """Whether the name is a hub name."""
        return not os.path.isabs(locate(settings, folder))


def tokenizer(settings: TransformersSettings, folder: str = "", named: str = MODEL_NAME) -> Any:
    """The tokenizer of a model; see ``mlorq.models.transformers_texts``. Arguments as those of ``locate``.

    Raises:
        ModelError: the tokenizer cannot be loaded, or lacks what batches of texts need.
    """
    from mlorq.models.sentence import read_embedding
    from mlorq.models.transformers_texts import load_tokenizer

    location = locate(settings, folder, named)
    try:
        with quiet():
            if settings.task == PAIRS and os.path.isdir(location):
                location = os.path.join(location, read_embedding(location, settings.name or "").inside)
            return load_tokenizer(location, settings.name or location)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        text = load_problem(error, location)
        raise ModelError(f"model {settings.name!r}: its tokenizer cannot be loaded: {text}") from error


def decoder_shift(settings: TransformersSettings, folder: str = "") -> Callable[[Tensor], Tensor]:
    """The function that makes the inputs of a model's decoder from labels; see ``mlorq.models.encoder_decoder``.

    Raises:
        ModelError: the model's configuration cannot be loaded, or it has no encoder and decoder.
    """
    from mlorq.models.encoder_decoder import shifter, without_values
    from mlorq.models.transformers_modules import model_class

    config = _configuration(settings, folder)
    kind = model_class(settings.task, type(config))
    if kind is None or not config.is_encoder_decoder:
        raise ModelError(f"model {settings.name!r} ({config.model_type}) has no encoder and decoder of texts")
    with quiet():
        return shifter(without_values(kind, config))


def class_names(settings: TransformersSettings, folder: str = "") -> list[str]:
    """Names of a classifier's classes in the order of its outputs; a single one for a regressor.

    Raises:
        ModelError: the model's configuration cannot be loaded.
    """
    found = _configuration(settings, folder)
    return [str(found.id2label.get(index, index)) for index in range(found.num_labels)]


def _configuration(settings: TransformersSettings, folder: str) -> Any:
    from transformers import AutoConfig

    location = locate(settings, folder)
    try:
        with quiet():
            return AutoConfig.from_pretrained(location, **settings.arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = load_problem(error, location)
        raise ModelError(f"model {settings.name!r}: its configuration cannot be loaded: {text}") from error


def locate(settings: TransformersSettings, folder: str = "", named: str = MODEL_NAME) -> str:
    """Location of a model: path of a folder (also inside an installed package), or else the hub name.

    Args:
        settings: settings of the model.
        folder: folder that relative paths start from.
        named: the key or option that holds the name, for errors.

    Raises:
        ModelError: the name is that of a folder, which is not on this machine or does not exist.
    """
    name = settings.name
    assert name is not None  # see check
    path = resolve_location(name, folder)
    if is_remote(name) or (is_remote(path) and not is_hub_name(name)):
        raise ModelError(f"{named}: folder {path} is not on this machine: copy it here, or use a hub name")
    if os.path.isdir(path):
        return path
    package, _, inside = name.partition("/")
    in_package = inside and ".." not in inside.split("/") and package.isidentifier()
    if in_package and (spec := importlib.util.find_spec(package)) is not None:
        for root in spec.submodule_search_locations or ():
            if os.path.isdir(os.path.join(root, inside)):
                return os.path.join(root, inside)
    if os.path.exists(path):
        raise ModelError(f"{named}: {path} is a file: give the folder that it is in, or a hub name")
    if not is_hub_name(name):
        raise ModelError(f"{named}: folder {path} does not exist")
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings for the duration of a ``with`` block."""
    from transformers.utils import logging

    log: Any = logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
