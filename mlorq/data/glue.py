"""The tasks of GLUE by name: each has its own text columns, classes and metrics (Wang et al. 2018, arXiv 1804.07461).

They come from the hub through the ``datasets`` library, or from a local copy: a file, a folder of the hub's Parquet
shards (``sst2/validation-00000-of-00001.parquet``), or what ``datasets`` saved to disk.

Classes are those of the hub's copy. Many models of NLI number theirs another way; where a model's configuration names
its classes as the task does, they are matched by name.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mlorq.artifacts.locations import is_remote, resolve_location
from mlorq.config.run import ModelConfig, SourceConfig
from mlorq.data.base import Dataset, required
from mlorq.data.choose import parquet_files
from mlorq.data.metrics import CLASSIFICATION, CORRELATION
from mlorq.data.table import read_columns
from mlorq.data.texts import Rows, checked_labels, checked_texts, text_dataset
from mlorq.errors import DataError
from mlorq.models.family import FAMILIES, TextInputs

HUB = "nyu-mll/glue"
LABEL = "label"
HIDDEN = -1  # the label of test splits


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        text: its text columns.
        metrics: the one that stands for it first, as in the paper's table of tasks.
        classes: their names in the order of the hub's class numbers; empty: labels are values.
        validation: splits of evaluation data, with what the metric's name ends in.
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


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """The texts of a task's split, its labels and its metrics."""
    inputs = required(FAMILIES[model_config.family].text_inputs(model_config.own, folder), source.source, "texts")
    assert source.task is not None
    for key in ("text", "label"):
        if getattr(source, key) is not None:
            raise DataError(f"{key} is not for source glue: task {source.task!r} knows its own columns")
    task = TASKS[source.task]
    pairs = inputs.pairs
    metrics = _metrics(source, task)
    if pairs and role == "evaluation" and task.classes:
        raise DataError(f"GLUE task {source.task!r} has classes, which a sentence encoder does not tell; choose stsb")
    splits = [(source.split, "")] if source.split else [("train", "")] if role == "calibration" else task.validation
    location = None if source.path is None else resolve_location(source.path, folder)
    if location is not None and source.split is None and url_to_fs(location)[0].isfile(url_to_fs(location)[1]):
        splits = [(splits[0][0], "")]  # one file is one split
    read = [_read(source.task, split, location) for split, _ in splits]
    sizes = [len(columns[LABEL]) for columns in read]
    starts = np.cumsum([0, *sizes])

    def where(column: str, index: int) -> str:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        row = index - int(starts[part]) + 1
        return f"GLUE task {source.task}, split {splits[part][0]}, row {row}, column {column!r}"

    columns = {name: [value for part in read for value in part[name]] for name in (*task.text, LABEL)}
    rows = Rows(
        f"GLUE task {source.task}, split {' and '.join(split for split, _ in splits)}",
        [checked_texts(columns[name], partial(where, name)) for name in task.text],
        None if pairs and role == "calibration" else _labels(columns[LABEL], partial(where, LABEL), role, task),
        partial(where, LABEL),
        range(1, len(columns[LABEL]) + 1),
        tuple((suffix, range(int(a), int(b))) for (_, suffix), a, b in zip(splits, starts, starts[1:], strict=False))
        if len(splits) > 1
        else (),
        None if pairs else _to_model(task, inputs),
    )
    return text_dataset(rows, source, role, model_config, folder, seed, metrics)


def _metrics(source: SourceConfig, task: Task) -> list[str]:
    """The task's metrics; one that the configuration names comes first."""
    if source.metric is None:
        return list(task.metrics)
    fitting = CLASSIFICATION if task.classes else CORRELATION
    if source.metric not in fitting or (len(task.classes) > 2 and source.metric != "accuracy"):
        known = "accuracy" if len(task.classes) > 2 else " or ".join(fitting)
        raise DataError(f"metric {source.metric!r} does not fit GLUE task {source.task!r}; choose {known}")
    return [source.metric, *(name for name in task.metrics if name != source.metric)]


def _labels(values: Sequence[Any], where: Any, role: str, task: Task) -> np.ndarray | None:
    """The labels; calibration data may be of a split that keeps them secret, and is without labels then."""
    labels = checked_labels(values, where, classes=bool(task.classes))
    hidden = np.flatnonzero(labels == HIDDEN)
    if len(hidden) and role == "evaluation":
        raise DataError(f"{where(int(hidden[0]))}: label -1: GLUE keeps the labels of its test splits secret")
    return None if len(hidden) else labels


def _to_model(task: Task, inputs: TextInputs) -> tuple[int, ...] | None:
    """The model's class of each class of the task, where its configuration names them in another order."""
    names = [name.lower().replace("-", "_") for name in inputs.class_names()] if task.classes else []
    if sorted(names) != sorted(task.classes) or names == list(task.classes):
        return None
    return tuple(names.index(name) for name in task.classes)


def _read(name: str, split: str, location: str | None) -> dict[str, list[Any]]:
    """The columns of a task's split.

    Raises:
        DataError: it is not there, or a column is missing.
    """
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
        try:
            with fs.open(file, "rb") as opened:
                parts.append(_of_table(pq.read_table(opened), wanted, f"table {file}"))
        except (OSError, ValueError) as error:
            raise DataError(f"table {file} is no Parquet file: {error}") from error
    return {key: [value for part in parts for value in part[key]] for key in wanted}


def _of_table(table: pa.Table, wanted: Sequence[str], origin: str) -> dict[str, list[Any]]:
    for key in wanted:
        if key not in table.column_names:
            raise DataError(f"{origin} has no column {key!r}; it has {', '.join(table.column_names)}")
    if not table.num_rows:
        raise DataError(f"{origin} is empty")
    return {key: table[key].to_pylist() for key in wanted}


def _library(instead: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"source glue needs the package datasets (pip install 'mlorq[hub]'), or {instead}") from None
    return datasets


def _from_hub(name: str, split: str) -> pa.Table:
    instead = "give path: a Parquet file or a folder of them"
    datasets = _library(instead)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(HUB, name, split=split)
    except Exception as error:  # whatever a network, a proxy or a cache raises
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"GLUE task {name!r}, split {split!r}: {HUB} cannot be loaded: {reason}; {instead}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    return found.data.table


def _from_disk(location: str, path: str, split: str) -> pa.Table:
    """A split of what ``save_to_disk`` wrote: one data set, or several by split."""
    if is_remote(location):
        raise DataError(f"data set {location} was saved by datasets: copy it here, or give Parquet files")
    datasets = _library("give path: Parquet files")
    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # whatever a damaged file makes of itself
        raise DataError(f"data set {location} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"data set {location} has no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    return found.data.table
