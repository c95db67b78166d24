"""GLUE tasks by name, each with its text columns, classes and metrics (Wang et al. 2018, arXiv 1804.07461).

The data is loaded from the hub with the ``datasets`` library, or from a local copy: a file, a folder of the hub's
Parquet shards (``sst2/validation-00000-of-00001.parquet``), or a folder written by ``save_to_disk`` of ``datasets``.

Class numbers are those of the hub's copy. Many NLI models number the classes differently; if a model's configuration
names its classes as the task does, classes are matched by name.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.artifacts.locations import is_remote, resolve_location
from mlorq.data.choose import before_glob, parquet_files
from mlorq.data.metrics import CLASSIFICATION, CORRELATION
from mlorq.data.model_inputs import text_inputs
from mlorq.data.packages import OptionalPackage
from mlorq.data.source import SOURCES, DataSource, ModelSettings, PathSettings, Role, SplitSettings, TextSettings
from mlorq.errors import DataError, one_line
from mlorq.models.family import TextInputs
from mlorq.registry import Settings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mlorq.data.base import Dataset

HUB = "nyu-mll/glue"
DATASETS = OptionalPackage("datasets", "hub")
LABEL = "label"
HIDDEN = -1  # the label in test splits, whose labels are secret


@dataclass(frozen=True)
class Task:
    """A GLUE task.

    Attributes:
        text: names of its text columns.
        metrics: names of its metrics, the main one first (Table 1 of the paper).
        classes: names in the order of the hub's class numbers; empty for a regression.
        validation: splits of the evaluation data, with the suffix of the metric's name.
    """

    text: tuple[str, ...]
    metrics: tuple[str, ...]
    classes: tuple[str, ...] = ()
    validation: tuple[tuple[str, str], ...] = (("validation", ""),)


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("matthews", "accuracy"), ("unacceptable", "acceptable")),
    "sst2": Task(("sentence",), ("accuracy",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy"), ("not_equivalent", "equivalent")),
    "qqp": Task(("question1", "question2"), ("f1", "accuracy"), ("not_duplicate", "duplicate")),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        (("validation_matched", ""), ("validation_mismatched", "_mismatched")),
    ),
    "qnli": Task(("question", "sentence"), ("accuracy",), ENTAILMENT),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",), ENTAILMENT),
    "wnli": Task(("sentence1", "sentence2"), ("accuracy",), ENTAILMENT[::-1]),
}


if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


class GlueSettings(TextSettings, SplitSettings, PathSettings):
    """Keys of a GLUE task."""

    task: TaskName | None = Field(None, description="GLUE task; it sets the text columns and metrics")


class GlueSource(DataSource[GlueSettings]):
    """A GLUE task, from the hub or a local copy."""

    name = "glue"
    settings = GlueSettings
    needed = ("task",)
    package = DATASETS

    def check(self, section: Settings) -> None:
        """Refuse column names: the task sets them."""
        super().check(section)
        for key in ("text", "label"):
            if getattr(section, key, None) is not None:
                task = getattr(section, "task", None)
                raise ValueError(f"{key} is not for source glue: task {task!r} sets its columns; leave {key} out")

    def locations(self, settings: GlueSettings) -> Sequence[str | None]:
        """The local copy and the list of samples."""
        return before_glob(settings.path), settings.list

    def from_hub(self, settings: GlueSettings) -> bool:
        """Whether no local copy is given."""
        return settings.path is None

    def requires(self, settings: GlueSettings, role: Role) -> OptionalPackage | None:
        """The package that fetches data from the hub, unless a local copy is given."""
        return DATASETS if self.from_hub(settings) else None

    def load(self, settings: GlueSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load texts, labels and metrics of a task's split; see ``DataSource.load``."""
        import numpy as np

        from mlorq.data.texts import Rows, checked_texts, text_dataset

        inputs = text_inputs(model, folder, self.name)
        assert settings.task is not None
        task = TASKS[settings.task]
        pairs = inputs.pairs
        metrics = _metrics(settings, task)
        if pairs and role == "evaluation" and task.classes:
            raise DataError(
                f"GLUE task {settings.task!r} is a classification, which a sentence encoder cannot do; choose stsb"
            )
        splits: Sequence[tuple[str, str]] = [("train", "")] if role == "calibration" else task.validation
        if settings.split:
            splits = [(settings.split, "")]
        location = None if settings.path is None else resolve_location(settings.path, folder)
        if location is not None and settings.split is None and url_to_fs(location)[0].isfile(url_to_fs(location)[1]):
            splits = [(splits[0][0], "")]  # a file holds one split
        read = [_read(settings.task, split, location) for split, _ in splits]
        sizes = [len(columns[LABEL]) for columns in read]
        starts = np.cumsum([0, *sizes])

        def where(column: str, index: int) -> str:
            part = int(np.searchsorted(starts, index, side="right")) - 1
            row = index - int(starts[part]) + 1
            return f"GLUE task {settings.task}, split {splits[part][0]}, row {row}, column {column!r}"

        bounds = zip(splits, starts, starts[1:], strict=False)
        parts = tuple((suffix, range(int(start), int(end))) for (_, suffix), start, end in bounds)
        columns = {name: [value for part in read for value in part[name]] for name in (*task.text, LABEL)}
        rows = Rows(
            f"GLUE task {settings.task}, split {' and '.join(split for split, _ in splits)}",
            [checked_texts(columns[name], partial(where, name)) for name in task.text],
            None if pairs and role == "calibration" else _labels(columns[LABEL], partial(where, LABEL), role, task),
            partial(where, LABEL),
            range(1, len(columns[LABEL]) + 1),
            parts if len(splits) > 1 else (),
            None if pairs else _to_model(task, inputs),
        )
        return text_dataset(rows, settings, role, inputs, folder, seed, metrics)


def _metrics(settings: GlueSettings, task: Task) -> list[str]:
    """The task's metrics, with the configured one first."""
    if settings.metric is None:
        return list(task.metrics)
    fitting = CLASSIFICATION if task.classes else CORRELATION
    if settings.metric not in fitting or (len(task.classes) > 2 and settings.metric != "accuracy"):
        known = "accuracy" if len(task.classes) > 2 else " or ".join(fitting)
        raise DataError(f"metric {settings.metric!r} does not fit GLUE task {settings.task!r}; choose {known}")
    return [settings.metric, *(name for name in task.metrics if name != settings.metric)]


def _labels(values: Sequence[Any], where: Any, role: Role, task: Task) -> np.ndarray | None:
    """The labels; None for calibration data from a split with secret labels."""
    import numpy as np

    from mlorq.data.texts import checked_labels

    labels = checked_labels(values, where, classes=bool(task.classes))
    hidden = np.flatnonzero(labels == HIDDEN)
    if len(hidden) and role == "evaluation":
        raise DataError(
            f"{where(int(hidden[0]))}: label -1: the labels of GLUE's test splits are secret; choose another split"
        )
    return None if len(hidden) else labels


def _to_model(task: Task, inputs: TextInputs) -> tuple[int, ...] | None:
    """The model's class number of each class of the task; None if they are equal or cannot be matched by name."""
    names = [name.lower().replace("-", "_") for name in inputs.class_names()] if task.classes else []
    if sorted(names) != sorted(task.classes) or names == list(task.classes):
        return None
    return tuple(names.index(name) for name in task.classes)


def _read(name: str, split: str, location: str | None) -> dict[str, list[Any]]:
    """The columns of a task's split.

    Raises:
        DataError: the data or a column is missing.
    """
    from mlorq.data.columns import read_columns, reading
    from mlorq.parquet import read_parquet

    wanted = (*TASKS[name].text, LABEL)
    if location is None:
        return _of_table(_from_hub(name, split), wanted, f"GLUE task {name!r} of {HUB}")
    fs, path = url_to_fs(location)
    if fs.isfile(path):
        return {str(key): value for key, value in read_columns(location, wanted)[0].items()}
    if fs.isdir(path) and fs.isdir(posixpath.join(path, name)):
        location, path = posixpath.join(location, name), posixpath.join(path, name)
    if fs.isdir(path) and any(fs.exists(posixpath.join(path, file)) for file in ("dataset_dict.json", "state.json")):
        return _of_table(_from_disk(location, path, split), wanted, f"data set {location}")
    fs, files = parquet_files(location, split)
    parts = []
    for file in files:
        with reading(f"table {file}"), fs.open(file, "rb") as opened:
            parts.append(_of_table(read_parquet(opened), wanted, f"table {file}"))
    return {key: [value for part in parts for value in part[key]] for key in wanted}


def _of_table(table: pa.Table, wanted: Sequence[str], origin: str) -> dict[str, list[Any]]:
    for key in wanted:
        if key not in table.column_names:
            raise DataError(f"{origin} has no column {key!r}; it has {', '.join(table.column_names)}")
    if not table.num_rows:
        raise DataError(f"{origin} is empty")
    return {key: table[key].to_pylist() for key in wanted}


def _from_hub(name: str, split: str) -> pa.Table:
    instead = "give path: a Parquet file or a folder of them"
    datasets = DATASETS.require("source glue", instead)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(HUB, name, split=split)
    except Exception as error:  # network, proxy and cache errors have many types
        reason = one_line(error)
        raise DataError(f"GLUE task {name!r}, split {split!r}: {HUB} cannot be loaded: {reason}; {instead}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    return found.data.table


def _from_disk(location: str, path: str, split: str) -> pa.Table:
    """A split of a folder written by ``save_to_disk``: of one data set, or of a dictionary of splits."""
    if is_remote(location):
        raise DataError(f"data set {location} was saved by datasets: copy it to a local folder, or give Parquet files")
    datasets = DATASETS.require("source glue", "give path: Parquet files")
    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # errors of damaged files have many types
        raise DataError(f"data set {location} cannot be loaded: {one_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"data set {location} has no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    return found.data.table


SOURCES.register(GlueSource())
