"""Source ``custom``: data from user code, given as ``package:function``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mlorq.data.source import SOURCES, DataSource, MetricSettings, ModelSettings, RefusedElsewhere, Role
from mlorq.errors import DataError, MlorqError

if TYPE_CHECKING:
    from torch import nn

    from mlorq.data.base import Dataset


NAME = "custom"
IN_MEMORY = {"source": NAME, "factory": "given:in_memory"}  # the section if the caller passes the data


class CustomSettings(MetricSettings):
    """Keys of data from user code."""

    factory: str | None = Field(
        None,
        description="package:function; for calibration it returns batches, for evaluation it takes the model and "
        "returns a dict of metrics",
    )
    batches: Annotated[str | None, RefusedElsewhere()] = Field(
        None,
        description="for evaluation: package:function that returns held-out batches for the output NMSE; default: the "
        "calibration data",
    )


class CustomSource(DataSource[CustomSettings]):
    """Batches or an evaluation from user functions."""

    name = NAME
    settings = CustomSettings
    needed = ("factory",)

    def check_role(self, settings: CustomSettings, role: Role) -> None:
        """Refuse ``batches`` for calibration."""
        if role == "calibration" and settings.batches is not None:
            raise ValueError("batches is for evaluation: the factory of calibration returns its batches; leave it out")

    def load(self, settings: CustomSettings, role: Role, model: ModelSettings, folder: str, seed: int) -> Dataset:
        """Load calibration batches from the function, or store it as the evaluation of a model.

        The key of an evaluation function covers its name and source text, but not the code that it calls. The optional
        ``batches`` are for the output NMSE.
        """
        import torch

        from mlorq.artifacts.hashing import digest_json
        from mlorq.data.base import Dataset
        from mlorq.data.memory import from_batches
        from mlorq.models.custom import describe_error, import_function, importable

        factory = settings.factory
        assert factory is not None
        if role == "calibration":
            return from_batches(_batches("factory", factory, folder))
        function = import_function(factory, folder, DataError)

        def evaluate(module: nn.Module) -> dict[str, float]:
            try:
                with importable(folder), torch.no_grad():
                    found = function(module)
            except MlorqError:
                raise
            except Exception as error:
                raise DataError(f"factory {factory!r} failed: {describe_error(error)}") from error
            values = found if isinstance(found, Mapping) else {settings.metric or "metric": found}
            try:
                return {str(name): float(value) for name, value in values.items()}
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"factory {factory!r} returned other values than numbers: {describe_error(error)}"
                ) from error

        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):
            text = ""
        key = digest_json([factory, text])
        if settings.batches is None:
            return Dataset([], 0, key, settings.metric, evaluate=evaluate)
        held_out = from_batches(_batches("batches", settings.batches, folder), "evaluation")
        key = digest_json([key, held_out.key])
        return replace(held_out, key=key, metric_name=settings.metric, evaluate=evaluate)


def _batches(key: str, named: str, folder: str) -> list[Any]:
    """The batches that a configured function returns.

    Args:
        key: the configuration key, for errors.
        named: ``package:function``.
        folder: from which modules are imported too.
    """
    from torch import Tensor

    from mlorq.models.custom import describe_error, import_function, importable

    function = import_function(named, folder, DataError)
    try:
        with importable(folder):
            found = function()
            if isinstance(found, Iterable) and not isinstance(found, (Tensor, Mapping)):
                return list(found)
    except Exception as error:
        raise DataError(f"{key} {named!r} failed: {describe_error(error)}") from error
    raise DataError(f"{key} {named!r} returned {type(found).__name__}, not a sequence of batches")


SOURCES.register(CustomSource())
