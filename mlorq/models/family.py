"""The interface of model families, and their registry.

A family declares which keys of the ``model`` section it reads (``settings``), loads a float model from them, and
describes its architecture so that checkpoints can be loaded without an instance. For data sources, exporters and
containers it also describes its inputs, makes example inputs, and lists the files that its settings name. Code outside
a family does not refer to it by name:

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

from mlorq.artifacts.locations import resolve_location
from mlorq.errors import CheckpointError
from mlorq.models.tasks import TASKS, InputKind
from mlorq.registry import Registry, Settings

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

    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]

Own = TypeVar("Own", bound=Settings)


class DerivedOutput(Protocol):
    """An output that an exported graph has beside those of the module."""

    def __call__(self, inputs: Mapping[str, Tensor], output: Any) -> Tensor:
        """The output, from the module's inputs by name and its output."""


class ModelSection(Protocol):
    """The keys of the ``model`` section that all families share."""

    @property
    def family(self) -> str:
        """Name of the family."""

    @property
    def dtype(self) -> str:
        """Name of the dtype that the model runs in."""

    @property
    def rotation(self) -> int | None:
        """Seed of the rotation of the residual stream; None: no rotation."""

    @property
    def own(self) -> Settings:
        """The settings of the family."""


class LibrarySettings(Settings):
    """Settings that the families of libraries share: models have a name in the library."""

    name: str | None = Field(
        None, description="name in the family's library or on its hub; or a folder, also one inside a package"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the constructor")
    task: TaskName | None = Field(None, description="task of the model, if the library has models for several tasks")

    def require_name(self, family: str) -> str:
        """The name.

        Raises:
            ValueError: ``name`` is not set.
        """
        if not self.name:
            raise ValueError(f"family {family} needs a name")
        return self.name


@dataclass(frozen=True)
class Example:
    """Values of an initial configuration, for ``mlorq init``.

    Attributes:
        model: values of the ``model`` section, without ``family``.
        data: values of the ``data`` section: ``{"calibration": …, "evaluation": …}``.
        named: placeholder of the model's name on the command line, as in ``mlorq init --model FAMILY:NAME``.
        name_key: key of ``model`` that this name sets.
    """

    model: dict[str, Any]
    data: dict[str, dict[str, Any]]
    named: str = "NAME"
    name_key: str = "name"


@dataclass(frozen=True)
class TextInputs:
    """Tokenizer and classes of a text model.

    Attributes:
        tokenizer: returns the model's tokenizer, with the interface of transformers; raises ModelError.
        class_names: returns the names of its classes in the order of its outputs (a single one: a regressor); raises
            ModelError.
        pairs: True for a sentence encoder, which is evaluated on pairs of texts; False for a classifier.
        predicts: which tokens a language model predicts: the next or masked ones, or those of a target text; ``tags``:
            a class for each word; ``answers``: where in the second text the answer to the first one is;
            ``choices``: which of several texts fits; None for other models.
        shift: for target texts: returns the function that makes a decoder's inputs from labels, each ``(samples,
            tokens)``; raises ModelError.
    """

    tokenizer: Callable[[], Any]
    class_names: Callable[[], list[str]]
    pairs: bool
    predicts: Literal["next", "masked", "target", "tags", "answers", "choices"] | None = None
    shift: Callable[[], Callable[[Tensor], Tensor]] | None = None


class ModelFamily(ABC, Generic[Own]):
    """Base class of model families.

    Attributes:
        name: name in a configuration.
        settings: class of the keys of the ``model`` section that the family reads.
        rebuilds: whether checkpoints of its models load without an instance.
        rotates: whether its models support ``rotation``.
        inputs: the kinds of inputs that its models take, each with a condition, as in ``{"texts": "with task
            text-classification"}``; an empty condition: all models of the family.
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
            settings: settings of this family.
            dtype: name of the dtype that the model runs in.
            folder: folder that relative paths start from.

        Raises:
            ModelError: the model, its weights or its code cannot be loaded.
        """

    @abstractmethod
    def example(self) -> Example:
        """Values of an initial configuration, for ``mlorq init``."""

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The module of an architecture, with weights yet to be loaded; needs no network.

        The architecture is data from a file: an implementation must not import, unpickle or fetch anything that it
        names, and refuses what it does not know (``mlorq.models.plain``). It is also called with all tensors on the
        meta device, to compare sizes before memory is taken (``mlorq.models.blank``).

        Raises:
            CheckpointError: the family cannot rebuild modules from a description, or not from this one.
        """
        raise CheckpointError(f"models of family {self.name} cannot be rebuilt from a checkpoint: pass model=instance")

    def describe(self, module: nn.Module) -> dict[str, Any] | None:
        """The architecture from which ``rebuild`` gives a module like this instance; None if not of this family."""
        return None

    def mark(self, module: nn.Module) -> None:
        """Set attributes that the search needs (``samples_axis``) on layers of this family's library.

        Args:
            module: a module of any family.
        """

    def classes(self, model: FloatModel) -> int | None:
        """Number of classes of a model (1: a regressor); None if unknown."""
        return None

    def display_name(self, settings: Own) -> str:
        """A short name of the model, for display and file names: the last distinctive part of its name."""
        return short_name(getattr(settings, "name", None) or "model")

    # -- inputs ---------------------------------------------------------------------------------------------------

    def image_inputs(self, settings: Own) -> dict[str, Any] | None:
        """Preprocessing of images, as arguments of timm's evaluation transform; None if it is not an image model."""
        return None

    def image_processor(self, settings: Own, folder: str = "") -> ImageProcessor | None:
        """Preprocessing of images by code of the library; None if ``image_inputs`` describes it.

        Raises:
            ModelError: the model's image processor cannot be loaded.
        """
        return None

    def features(self, settings: Own) -> bool:
        """Whether the model's outputs are features, not scores of classes."""
        return False

    def maps(self, settings: Own) -> bool:
        """Whether the model's outputs are maps: scores of classes at every position of an image."""
        return False

    def depths(self, settings: Own) -> bool:
        """Whether the model's outputs are depths at every position of an image."""
        return False

    def two_towers(self, settings: Own, folder: str = "") -> TwoTowers | None:
        """Preparation of images and texts for a model that embeds both; None for other models.

        Raises:
            ModelError: the model's image processor or tokenizer cannot be loaded.
        """
        return None

    def text_inputs(self, settings: Own, folder: str = "") -> TextInputs | None:
        """Tokenizer and classes of the model; None if it is not a text model."""
        return None

    def detector(self, settings: Own, folder: str = "") -> Detector | None:
        """Preprocessing and inference of the model as a detector; None if it is not one.

        Raises:
            ModelError: its image processor or an argument is missing or invalid.
        """
        return None

    def prompted(self, settings: Own, folder: str = "") -> Prompted | None:
        """Preparation and inference of a model that masks what boxes enclose; None for other models.

        Raises:
            ModelError: its processor cannot be loaded, or makes no masks of boxes.
        """
        return None

    def recogniser(self, settings: Own, folder: str = "", language: str | None = None) -> Recogniser | None:
        """Preparation and decoding of recordings; None if it is not a model of speech.

        Args:
            settings: settings of this family.
            folder: folder that relative paths start from.
            language: language of the recordings, for a model of several.

        Raises:
            ModelError: a part of it cannot be loaded, or it does not take a language.
        """
        return None

    def sound_classifier(self, settings: Own, folder: str = "") -> SoundClassifier | None:
        """Preparation of recordings and class names; None if it is not a classifier of recordings.

        Raises:
            ModelError: its feature extractor or configuration cannot be loaded.
        """
        return None

    def preprocess(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        """Preprocessing of an architecture's inputs, as JSON values; None if unknown.

        ``kind`` is ``image``, ``text`` or ``audio``; ``inputs`` are the keys of a batch, if it is a mapping.
        """
        return None

    def example_input(
        self, architecture: Mapping[str, Any], batch: Batch | None = None, samples: int = 1
    ) -> Batch | None:
        """A batch of the right shapes and dtypes, on the CPU, for tracing.

        Args:
            architecture: architecture of a ``FloatModel`` or a checkpoint.
            batch: calibration data to take the samples from; None: random inputs.
            samples: number of samples.

        Returns:
            A batch; None if ``batch`` is None and the architecture does not determine its inputs.
        """
        if batch is None:
            return self._made_input(architecture, samples)
        from mlorq.models.batches import take_samples, unmarked

        return unmarked(take_samples(batch, slice(0, samples)))

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Batch | None:
        """Random inputs from a fixed seed."""
        return None

    def derived_outputs(self, architecture: Mapping[str, Any]) -> dict[str, DerivedOutput]:
        """Outputs that an exported graph has beside the module's, by name: functions of its inputs and its output."""
        return {}

    def exported_part(self, architecture: Mapping[str, Any], batch: Batch) -> tuple[str, Batch]:
        """The submodule that graphs can hold, and its inputs for a batch; the name is empty for the whole module."""
        return "", batch

    # -- files ----------------------------------------------------------------------------------------------------

    def locations(self, settings: Own) -> list[str]:
        """Files and folders that the settings name, as written there; they are mounted in containers."""
        return []

    def local_paths(self, settings: Own, folder: str = "") -> list[str]:
        """The absolute paths, or URLs, of ``locations``, also of folders inside installed packages.

        Args:
            settings: settings of this family.
            folder: folder that relative paths start from.

        Raises:
            ModelError: a path does not exist.
        """
        return [resolve_location(location, folder) for location in self.locations(settings)]

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


def takers(*kinds: InputKind) -> str:
    """The families whose models take one of these inputs, for messages: ``family a, or family b with task c``."""
    found = []
    for family in FAMILIES:
        conditions = [family.inputs[kind] for kind in kinds if kind in family.inputs]
        if conditions:
            found.append((family.name, " or ".join(filter(None, conditions))))
    return ", or ".join(f"family {name}{f' {which}' if which else ''}" for name, which in found)


def short_name(name: str) -> str:
    """The last part of a model's name or path other than ``model``, ``.`` and ``..``."""
    name = name.rstrip("/")
    parts = [part for part in name.replace(":", "/").split("/") if part not in ("model", ".", "..")]
    return parts[-1] if parts else name
