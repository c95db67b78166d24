"""Data from the user's own code, named as ``package:function``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.artifacts.hashing import digest_json
from mlorq.config.run import ModelConfig, SourceConfig
from mlorq.data.base import Dataset
from mlorq.data.memory import from_batches
from mlorq.errors import DataError
from mlorq.models.custom import describe_error, import_function, importable


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """Calibration: call the function, it returns batches. Evaluation: keep it, it is called with the model.

    An evaluation function's key is its name and source text: code that it calls in turn is not seen. Batches beside it
    are those that the output NMSE is measured on.
    """
    assert source.factory is not None
    if role == "calibration":
        return from_batches(_batches("factory", source.factory, folder))
    function = import_function(source.factory, folder, DataError)

    def evaluate(module: nn.Module) -> dict[str, float]:
        with importable(folder), torch.no_grad():
            found = function(module)
        values = found if isinstance(found, Mapping) else {source.metric or "metric": found}
        try:
            return {str(name): float(value) for name, value in values.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"factory {source.factory!r} returned no numbers: {describe_error(error)}") from error

    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = ""
    key = digest_json([source.factory, text])
    if source.batches is None:
        return Dataset([], 0, key, source.metric, evaluate=evaluate)
    held_out = from_batches(_batches("batches", source.batches, folder), "evaluation")
    return replace(held_out, key=digest_json([key, held_out.key]), metric_name=source.metric, evaluate=evaluate)


def _batches(key: str, named: str, folder: str) -> list[Any]:
    """What the function named by a key of the configuration returns."""
    function = import_function(named, folder, DataError)
    try:
        with importable(folder):
            found = function()
            if isinstance(found, Iterable) and not isinstance(found, (Tensor, Mapping)):
                return list(found)
    except Exception as error:
        raise DataError(f"{key} {named!r} failed: {describe_error(error)}") from error
    raise DataError(f"{key} {named!r} returned {type(found).__name__}, no sequence of batches")
