"""Data sources: the interface, the registry, and the configuration keys that several of them share.

A source is one file: a settings class with its configuration keys, and a record that loads a data set from them:

    class LinesSettings(BatchSettings, SamplesSettings, PathSettings): ...

    class Lines(DataSource[LinesSettings]):
        name = "lines"
        settings = LinesSettings
        needed = ("path",)

        def load(self, settings, role, model, folder, seed): ...

    SOURCES.register(Lines())

Pydantic lists the keys of the last base class first; so does ``mlorq init``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field

from mlorq.data.metrics import METRICS
from mlorq.data.package_metrics import is_named, known_metric, with_named_metric
from mlorq.data.packages import OptionalPackage
from mlorq.errors import no_secrets
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    from mlorq.data.base import Dataset
    from mlorq.models.base import FloatModel

    MetricName = str
else:
    MetricName = Annotated[Literal[METRICS] | str, AfterValidator(known_metric)]

Role = Literal["calibration", "evaluation"]
Columns = list[int | str]  # defined here because ``list`` is a key below


@dataclass(frozen=True)
class RefusedElsewhere:
    """Marks a key that sources without it refuse; other keys of other sources are ignored."""


class SourceSettings(Settings):
    """The keys of a data source."""


class RootSettings(SourceSettings):
    """Sources with a folder of images or recordings."""

    root: str | None = Field(
        None, description="folder of images, or of recordings (default: the table's folder), local path or fsspec URL"
    )


class PathSettings(SourceSettings):
    """Sources of tables and shards."""

    path: str | None = Field(
        None,
        description="CSV, TSV, JSON lines or Parquet file; Parquet shards: file, folder or glob; a task: local copy "
        "(file, or folder as on the hub), by default the hub's",
    )


class SplitSettings(SourceSettings):
    """Sources that hold several splits."""

    split: str | None = Field(
        None,
        description="value of the split column, name of the shards, or split of a task (default: train for "
        "calibration, validation for evaluation)",
    )


class LabelSettings(SourceSettings):
    """Sources with a column of labels."""

    label: int | str | None = Field(
        None,
        description="label column (class, value, tags, answers, transcript), by name, or by number in a table without "
        "a header; a metric of texts needs it, images have 'label' by default; with choices: number, name or "
        "text of the right one",
    )


class MetricSettings(SourceSettings):
    """Sources whose evaluation data has a metric."""

    metric: MetricName | None = Field(
        None,
        description="evaluation metric; the task's usual one by default; evaluate:NAME, evaluate:FOLDER or "
        "torchmetrics:CLASS: one of these packages (extra metrics)",
    )
    metric_arguments: dict[str, Any] = Field(
        {}, description="keyword arguments of a metric of another package, for example {average: macro}"
    )

    def check(self) -> None:
        """Refuse arguments of other metrics than those of packages."""
        super().check()
        if self.metric_arguments and not is_named(self.metric):
            raise ValueError(
                "metric_arguments is for metrics of other packages: set metric to evaluate:NAME or torchmetrics:CLASS"
            )


class SamplesSettings(SourceSettings):
    """Sources that can be sampled."""

    samples: int | None = Field(None, ge=1, description="number of samples, a seeded random choice; default: all")


class ListSettings(SamplesSettings):
    """Sources whose samples can be listed by name or row number."""

    list: Annotated[str | None, RefusedElsewhere()] = Field(
        None, description="text file that names the samples to use, one per line: a file's name, or a row number from 1"
    )

    def check(self) -> None:
        """Refuse ``samples`` together with ``list``."""
        super().check()
        if self.list is not None and self.samples is not None:
            raise ValueError("samples and list exclude each other: give one of them")


class BatchSettings(SourceSettings):
    """Sources that build batches from samples."""

    batch_size: int = Field(32, ge=1, description="samples per forward pass")


class LengthSettings(SourceSettings):
    """Sources whose samples can be texts."""

    max_length: int = Field(128, ge=8, description="maximum number of tokens per sequence; longer ones are truncated")


class TokenSettings(LengthSettings, BatchSettings):
    """Sources that tokenize."""


class TextSettings(TokenSettings, ListSettings, MetricSettings):
    """Sources of texts, which are tokenized."""


class LanguageSettings(TokenSettings, SamplesSettings, MetricSettings):
    """Sources of running text alone, which is cut into pieces of ``max_length`` tokens."""


class ImageSettings(BatchSettings, ListSettings, MetricSettings):
    """Sources of images for classifiers."""


class ImageColumnSettings(SourceSettings):
    """Sources of tables with a column of images."""

    image: str = Field("image", description="column of encoded images; in a table of captions, of their files")


class TextColumnsSettings(SourceSettings):
    """Sources of tables with columns of texts."""

    text: Columns | None = Field(
        None,
        description="text columns, by name (header) or number (no header); text2text-generation: source and target; "
        "question-answering: question and text",
    )

    def check(self) -> None:
        """Refuse an empty list of text columns."""
        super().check()
        if self.text == []:
            raise ValueError("text is an empty list: give one or two columns")


class ChoiceSettings(TextColumnsSettings):
    """Sources of rows with choices, one of which is right."""

    choices: Annotated[Columns | None, RefusedElsewhere()] = Field(
        None,
        description="columns of the choices, or one column of lists (also ARC's mappings with text and label); for "
        "task multiple-choice, and text-generation's evaluation by the likelihood of choices",
    )
    first_choice: Annotated[int, RefusedElsewhere()] = Field(
        0, description="number of the first choice, if labels are numbers"
    )
    prompt: Annotated[str | None, RefusedElsewhere()] = Field(
        None,
        description="form of the context, with {} for each text column; default: the texts with spaces between them",
    )
    blank: Annotated[str | None, RefusedElsewhere()] = Field(
        None, min_length=1, description="mark in the context whose place choices take (WinoGrande: _)"
    )

    def check(self) -> None:
        """Refuse keys that need ``choices``, and a prompt with another number of places than text columns."""
        super().check()
        if self.choices == []:
            raise ValueError("choices is an empty list: give the columns of the choices")
        if self.choices is None:
            for key in ("first_choice", "prompt", "blank"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} needs choices, the columns of the choices")
        if self.prompt is not None and self.prompt.count("{}") != len(self.text or ()):
            raise ValueError(
                f"prompt has {self.prompt.count('{}')} places {{}} for {len(self.text or ())} text columns"
            )


class ModelSettings(Protocol):
    """The keys of the ``model`` section that sources read."""

    @property
    def family(self) -> str:
        """Name of the model family."""

    @property
    def own(self) -> Settings:
        """The family's own settings."""


class SourceSection(Protocol):
    """The ``calibration`` or ``evaluation`` section."""

    @property
    def source(self) -> str:
        """Name of the data source."""

    @property
    def own(self) -> Settings:
        """The settings of that source."""


Own = TypeVar("Own", bound=SourceSettings)


class DataSource(ABC, Generic[Own]):
    """One kind of data source.

    Attributes:
        name: its name in configurations.
        settings: class of its configuration keys.
        needed: names of the required keys.
        package: an optional package that some of its settings need.
    """

    name: str
    settings: type[Own]
    needed: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[OptionalPackage | None] = None

    @abstractmethod
    def load(self, settings: Own, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load the data.

        Args:
            settings: of this source.
            role: calibration or evaluation; the latter has a metric.
            model: the ``model`` section; its family and task determine the form of batches.
            folder: base of relative paths.
            seed: of the choice of ``samples``.

        Raises:
            DataError: the data is missing, malformed, or does not fit the model.
        """

    def locations(self, settings: Own) -> Sequence[str | None]:
        """Files and folders that the settings name (local paths or URLs), as written there."""
        return ()

    def from_hub(self, settings: Own) -> bool:
        """Whether the data is fetched from the Hugging Face hub."""
        return False

    def requires(self, settings: Own, role: Role) -> OptionalPackage | None:
        """The optional package that the data cannot be loaded without."""
        return None

    def check_role(self, settings: Own, role: Role) -> None:
        """Raise ValueError, with the key first, if a value does not fit the role."""

    def check(self, section: Settings) -> None:
        """Check a flat section that has the keys of all sources.

        Raises:
            ValueError: a required key is missing, or a key is set that this source refuses.
        """
        for key in self.needed:
            if getattr(section, key) is None:
                raise ValueError(f"source {self.name} needs {key}")
        for key, info in type(section).model_fields.items():
            refused = key not in self.settings.model_fields and RefusedElsewhere() in info.metadata
            if refused and getattr(section, key) != info.default:
                readers = [source.name for source in SOURCES if key in source.settings.model_fields]
                raise ValueError(f"{key} is for source {', '.join(readers)}, not for source {self.name}")


SOURCES: Registry[DataSource[Any]] = Registry("data source")


@no_secrets()
def load_dataset(
    section: SourceSection, role: Role, model: FloatModel, model_settings: ModelSettings, folder: str, seed: int
) -> Dataset:
    """Load the data that a configuration names, in the form that the model takes.

    Args:
        section: the ``calibration`` or ``evaluation`` section.
        role: the section that it is; evaluation data has a metric.
        model: the float model.
        model_settings: the ``model`` section (preprocessing, tokenizer, task).
        folder: base of relative paths.
        seed: of the choice of ``samples``.

    Raises:
        DataError: the data is missing, malformed or too small, or the model cannot predict the labels of evaluation
            data. Labels of calibration data, which few costs read, are not checked here.
    """
    from mlorq.data.memory import check_size

    given = own = section.own
    metric = getattr(own, "metric", None)
    if is_named(metric):
        own = own.model_copy(update={"metric": None, "metric_arguments": {}})
    found = SOURCES[section.source].load(own, role, model_settings, folder, seed)
    if metric is not None and isinstance(given, MetricSettings) and is_named(metric) and role == "evaluation":
        found = with_named_metric(found, metric, given.metric_arguments, folder)
    if role == "calibration":
        check_size(found.samples, role)
    else:
        found.check_labels(model)
    return found
