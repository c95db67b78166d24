"""Data from the user's own code, named as ``package:function``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mlorq.config import ModelConfig, SourceConfig
from mlorq.data.base import Dataset
from mlorq.errors import DataError
from mlorq.hashing import digest_json
from mlorq.models.custom import describe_error, import_function, importable


def load(source: SourceConfig, role: str, model_config: ModelConfig, folder: str, seed: int) -> Dataset:
    """Calibration: call the function, it returns batches. Evaluation: keep it, it is called with the model.

    An evaluation function's key is its name and source text: code that it calls in turn is not seen.
    """
    assert source.factory is not None
    function = import_function(source.factory, folder, DataError)
    if role == "calibration":
        try:
            with importable(folder):
                batches = function()
                if isinstance(batches, Iterable) and not isinstance(batches, (Tensor, Mapping)):
                    return Dataset(list(batches), 0, "")
        except Exception as error:
            raise DataError(f"factory {source.factory!r} failed: {describe_error(error)}") from error
        raise DataError(f"factory {source.factory!r} returned {type(batches).__name__}, no sequence of batches")

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
    return Dataset([], 0, digest_json([source.factory, text]), source.metric, evaluate=evaluate)
