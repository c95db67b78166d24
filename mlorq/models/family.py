"""What a model family answers for, and the registry of families.

A family says which keys of the ``model`` section it reads (``settings``), loads a float model from them, describes its
architecture so that checkpoints rebuild themselves, and tells data sources, exporters and containers what they need:
how inputs are prepared, what an example input is, which files its settings name. Nobody else names a family:

    class Mine(ModelFamily[MySettings]):
        name, settings = "mine", MySettings

        def load(self, settings, *, dtype="float32", folder=""): ...

    FAMILIES.register(Mine())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import Field

from mlorq.errors import CheckpointError
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.base import Batch, FloatModel
    from mlorq.models.detector import Detector

InputKind = Literal["images", "texts", "objects"]  # objects: images in which things are found
Task = Literal[
    "image-classification", "text-classification", "sentence-similarity", "object-detection", "instance-segmentation"
]
Own = TypeVar("Own", bound=Settings)


class ModelSection(Protocol):
    """The ``model`` section of a configuration, as far as all families share it."""

    @property
    def family(self) -> str:
        """Name of the family."""

    @property
    def dtype(self) -> str:
        """Dtype that the model runs in."""

    @property
    def rotation(self) -> int | None:
        """Seed of a rotation of the residual stream."""

    @property
    def own(self) -> Settings:
        """The family's own settings."""


class LibrarySettings(Settings):
    """Keys of families whose models have a name in a library."""

    name: str | None = Field(
        None, description="name in the family's library or on its hub; or a model's folder, or a package's folder"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the constructor")
    task: Task | None = Field(None, description="what the model's output is, where the library has several")

    def require_name(self, family: str) -> str:
        """The name.

        Raises:
            ValueError: there is none.
        """
        if not self.name:
            raise ValueError(f"family {family} needs a name")
        return self.name


@dataclass(frozen=True)
class Example:
    """Values of a configuration to start from.

    Attributes:
        model: of the ``model`` section, without ``family``.
        data: ``{"calibration": …, "evaluation": …}``.
        named: how the model is named on the command line, ``mlorq init --model FAMILY:NAMED``.
        name_key: the key of ``model`` that this sets.
    """

    model: dict[str, Any]
    data: dict[str, dict[str, Any]]
    named: str = "NAME"
    name_key: str = "name"


@dataclass(frozen=True)
class TextInputs:
    """How a model reads texts.

    Attributes:
        tokenizer: gives the model's tokenizer, in the interface of transformers; raises ModelError.
        class_names: gives its classes in the order of its outputs (one: a regressor); raises ModelError.
        pairs: whether it embeds each text, so that pairs of them are compared; else rows are classified.
    """

    tokenizer: Callable[[], Any]
    class_names: Callable[[], list[str]]
    pairs: bool


class ModelFamily(ABC, Generic[Own]):
    """One model family.

    Attributes:
        name: as a configuration writes it.
        settings: the keys of the ``model`` section that it reads.
        rebuilds: whether checkpoints of its models load without an instance.
        rotates: whether ``rotation`` applies to its models.
        inputs: the kinds of inputs that its models take, and for which of its models, as in ``{"texts": "with task
            text-classification"}``; an empty text: for all.
    """

    name: str
    settings: type[Own]
    rebuilds: ClassVar[bool] = False
    rotates: ClassVar[bool] = False
    inputs: ClassVar[Mapping[InputKind, str]] = {}

    @abstractmethod
    def load(self, settings: Own, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """The float model with its weights.

        Args:
            settings: its own.
            dtype: name of the dtype that it runs in.
            folder: where relative paths start.

        Raises:
            ModelError: the model, its weights or its code cannot be loaded.
        """

    @abstractmethod
    def example(self) -> Example:
        """Values for ``mlorq init``."""

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        """A module of a described architecture, with weights yet to be loaded; without network.

        Raises:
            CheckpointError: the family cannot rebuild modules from a description.
        """
        raise CheckpointError(f"a model of family {self.name} cannot rebuild itself: pass model=instance")

    def describe(self, module: nn.Module) -> dict[str, Any] | None:
        """The architecture of an instance in memory from which ``rebuild`` makes its like; None: not of this family."""
        return None

    def mark(self, module: nn.Module) -> None:
        """Note on layers of the family's library, in a module of any family, what the search cannot see itself."""

    def classes(self, model: FloatModel) -> int | None:
        """How many classes a model tells apart (one: a regressor); None where that is not known."""
        return None

    def display_name(self, settings: Own) -> str:
        """A short name of the model for people and file names: the last part of its name that says something."""
        return short_name(getattr(settings, "name", None) or "model")

    # -- inputs ---------------------------------------------------------------------------------------------------

    def image_inputs(self, settings: Own) -> dict[str, Any] | None:
        """Preprocessing of images, as timm's evaluation transform takes it; None: the model does not take images."""
        return None

    def text_inputs(self, settings: Own, folder: str = "") -> TextInputs | None:
        """How the model reads texts; None: it does not."""
        return None

    def detector(self, settings: Own, folder: str = "") -> Detector | None:
        """How the model finds objects in images; None: it does not.

        Raises:
            ModelError: what it needs cannot be loaded.
        """
        return None

    def preprocess(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        """How inputs of an architecture are prepared, as JSON values; None where that is not known.

        ``kind`` is ``image`` or ``text``; ``inputs`` the keys of a batch, where it is a mapping.
        """
        return None

    def example_input(
        self, architecture: Mapping[str, Any], batch: Batch | None = None, samples: int = 1
    ) -> Batch | None:
        """Inputs of the right shapes and types, on the CPU: what an exporter traces.

        Args:
            architecture: of a ``FloatModel`` or a checkpoint.
            batch: of calibration data, of which samples are taken where there is one.
            samples: how many.

        Returns:
            A batch; None where none is given and the architecture does not say what it takes.
        """
        if batch is None:
            return self._made_input(architecture, samples)
        from mlorq.models.base import take_samples

        return take_samples(batch, slice(0, samples))

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Batch | None:
        """Random inputs from a fixed seed."""
        return None

    # -- files ----------------------------------------------------------------------------------------------------

    def locations(self, settings: Own) -> list[str]:
        """Files and folders that the settings name, as they are written: a container has to see them."""
        return []

    def uses_hub(self, settings: Own, folder: str = "") -> bool:
        """Whether the model or its weights are fetched from the hub.

        Raises:
            ModelError: a path does not exist.
        """
        return False


FAMILIES: Registry[ModelFamily[Any]] = Registry("model family")


def load(section: ModelSection, folder: str = "") -> FloatModel:
    """The float model that a ``model`` section names (``mlorq.models.load_model``); every family's module has it."""
    from mlorq.models.loading import load_model

    return load_model(section, folder)


def takers(kind: InputKind) -> str:
    """The families whose models take a kind of inputs, for messages: ``family a, or family b with task c``."""
    found = [(family.name, family.inputs[kind]) for family in FAMILIES if kind in family.inputs]
    return ", or ".join(f"family {name}{f' {which}' if which else ''}" for name, which in found)


def short_name(name: str) -> str:
    """The last part of a model's name or path that says something."""
    name = name.rstrip("/")
    parts = [part for part in name.replace(":", "/").split("/") if part not in ("model", ".", "..")]
    return parts[-1] if parts else name
