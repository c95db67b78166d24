"""Metrics of other packages, by name: ``evaluate:f1``, ``evaluate:./my_metric``, ``torchmetrics:MulticlassF1Score``.

They are computed from the predictions and the references of a task: class numbers, values of a regression, or texts.
``load_dataset`` puts them in the place of the data's usual metric, so that sources need to know nothing about them.

Metrics of ``evaluate`` are code: that of a local folder, or else of the hub.
"""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mlorq.artifacts.locations import is_remote, resolve_location
from mlorq.data.metrics import METRICS
from mlorq.data.packages import EVALUATE, TORCHMETRICS, OptionalPackage
from mlorq.errors import DataError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlorq.data.base import Dataset, Predicted, Predicts

MARK = ":"
Judge = Callable[["Predicted"], Any]  # a number, or a mapping of names to numbers


class MetricPackage(ABC):
    """A package of metrics.

    Attributes:
        package: how it is imported and installed.
    """

    package: ClassVar[OptionalPackage]

    @abstractmethod
    def load(self, name: str, arguments: Mapping[str, Any], folder: str) -> tuple[Judge, str]:
        """The metric, and a hash of its code or its version.

        Args:
            name: name of the metric, or its location.
            arguments: keyword arguments from the configuration.
            folder: base of relative paths.

        Raises:
            DataError: there is no such metric.
        """

    def location(self, name: str) -> str | None:
        """A folder or file that the name is, or may be."""
        return None


class Evaluate(MetricPackage):
    """Metrics of ``evaluate``, each a script in a folder or on the hub."""

    package = EVALUATE

    def load(self, name: str, arguments: Mapping[str, Any], folder: str) -> tuple[Judge, str]:
        """See ``MetricPackage.load``."""
        from mlorq.artifacts.hashing import digest_bytes, digest_json

        place = resolve_location(name, folder)
        local = not is_remote(place) and os.path.exists(place)
        if not local and name.startswith((".", "/", "~")):
            raise DataError(f"metric evaluate:{name}: {place} does not exist")
        found = self.package.require(f"metric evaluate:{name}").load(place if local else name, keep_in_memory=True)
        code = []
        if local:
            for root, _, files in sorted(os.walk(place)) if os.path.isdir(place) else [("", [], [place])]:
                for file in sorted(file for file in files if file.endswith(".py")):
                    with open(os.path.join(root, file), "rb") as stream:
                        code.append(digest_bytes(stream.read()))

        def judge(predicted: Predicted) -> Any:
            lists = {"predictions": list(predicted.predictions), "references": list(predicted.references)}
            return found.compute(**lists, **arguments)

        return judge, digest_json([name if not local else "", code])

    def location(self, name: str) -> str | None:
        """The name, if it is a path."""
        return name if name.startswith((".", "/", "~")) or os.sep in name else None


class TorchMetrics(MetricPackage):
    """Classes of ``torchmetrics``."""

    package = TORCHMETRICS
    places = ("torchmetrics", "torchmetrics.classification", "torchmetrics.regression", "torchmetrics.text")

    def load(self, name: str, arguments: Mapping[str, Any], folder: str) -> tuple[Judge, str]:
        """See ``MetricPackage.load``."""
        import torch

        package = self.package.require(f"metric torchmetrics:{name}")
        modules = [importlib.import_module(place) for place in self.places]
        kind = next((getattr(module, name) for module in modules if name in module.__all__), None)
        if not (isinstance(kind, type) and issubclass(kind, package.Metric)):
            raise DataError(f"metric torchmetrics:{name}: torchmetrics has no metric of this name")
        kind(**arguments)

        def judge(predicted: Predicted) -> Any:
            texts = predicted.kind == "texts"
            pair = predicted.predictions, predicted.references
            metric = kind(**arguments)
            metric.update(*([list(values) for values in pair] if texts else map(torch.as_tensor, pair)))
            return metric.compute()

        return judge, package.__version__


PACKAGES: dict[str, MetricPackage] = {"evaluate": Evaluate(), "torchmetrics": TorchMetrics()}


def is_named(metric: str | None) -> bool:
    """Whether a metric is one of another package."""
    return metric is not None and metric.partition(MARK)[0] in PACKAGES and MARK in metric


def known_metric(metric: str) -> str:
    """The metric, if it is one of mlorq's or the name of one in an installed package.

    Raises:
        ValueError: it is neither.
    """
    package, _, name = metric.partition(MARK)
    if is_named(metric) and name:
        try:
            PACKAGES[package].package.find(f"metric {metric}")
        except DataError as error:
            raise ValueError(str(error)) from None
    elif metric not in METRICS:
        others = ", ".join(f"{package}:NAME" for package in PACKAGES)
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}, {others}")
    return metric


def metric_location(metric: str | None) -> str | None:
    """Folder or file of a metric's code, as the configuration names it; None for others."""
    if metric is None or not is_named(metric):
        return None
    package, _, name = metric.partition(MARK)
    return PACKAGES[package].location(name)


@dataclass(frozen=True)
class NamedMetric:
    """A metric of another package, in the place of ``metric`` or ``evaluate`` of a ``Dataset``.

    Attributes:
        title: as in the configuration, for errors.
        name: its own name, under which the main value is reported.
        judge: computes it.
        source: gives the predictions.
    """

    title: str
    name: str
    judge: Judge
    source: Predicts

    def __call__(self, given: Tensor | nn.Module) -> dict[str, float]:
        """Its values, the main one first: that with the metric's own name, or else the first.

        Args:
            given: f(x) of all samples, or the model, as the predictions need it.

        Raises:
            DataError: the package refuses the predictions, or its main value is not a finite number.
        """
        predicted = self.source.predictions(given)
        try:
            returned = self.judge(predicted)
            found = dict(returned) if isinstance(returned, Mapping) else {self.name: returned}
            values = {str(key): number for key, value in found.items() if (number := _number(value)) is not None}
        except Exception as error:  # code of another package
            raise DataError(f"metric {self.title} failed on {predicted.kind}: {one_line(error)}") from error
        if not values or (self.name in found and self.name not in values):
            raise DataError(f"metric {self.title} returned no finite number: set metric_arguments, such as an average")
        return {self.name: values.get(self.name, next(iter(values.values()))), **values}


def _number(value: Any) -> float | None:
    """A finite number, also as a tensor or an array of one entry; None for anything else."""
    if getattr(value, "size", None) is not None and hasattr(value, "reshape"):
        if math.prod(getattr(value, "shape", ())) != 1:
            return None
        value = value.reshape(()).item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def with_named_metric(data: Dataset, metric: str, arguments: Mapping[str, Any], folder: str) -> Dataset:
    """Evaluation data with a metric of another package instead of its own.

    Args:
        data: the data set with the task's usual metric.
        metric: ``package:name``.
        arguments: keyword arguments: of ``compute`` (evaluate), or of the class (torchmetrics).
        folder: base of relative paths.

    Raises:
        DataError: there is no such metric, it does not take the arguments, or the data has no predictions for it.
    """
    from mlorq.artifacts.hashing import digest_json
    from mlorq.data.base import Predicts

    usual = data.metric or data.evaluate
    if usual is None:
        raise DataError(f"metric {metric} needs evaluation data with labels: give the column or file of the labels")
    if not isinstance(usual, Predicts):
        raise DataError(
            f"metric {metric} needs predicted classes, values or texts, which this data does not have; "
            f"choose {data.metric_name or 'a metric of mlorq'}, or use source custom"
        )
    package, _, name = metric.partition(MARK)
    try:
        judge, version = PACKAGES[package].load(name, arguments, folder)
    except DataError:
        raise
    except Exception as error:  # code of another package
        raise DataError(f"metric {metric} cannot be loaded: {one_line(error)}") from error
    own = os.path.splitext(os.path.basename(name.rstrip("/")))[0] or name
    found = NamedMetric(metric, own, judge, usual)
    key = digest_json([data.key, package, own, dict(arguments), version])
    if data.metric is not None:
        return replace(data, key=key, metric_name=own, metric=found)
    return replace(data, key=key, metric_name=own, evaluate=found)
