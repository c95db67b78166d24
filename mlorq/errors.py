"""Errors that a user can act on.

The message of each is one line that names the key, file, layer or artifact at fault. The command line prints it and
exits with status 2. Any other exception is a defect of the software and keeps its traceback.
"""

from __future__ import annotations


class MlorqError(Exception):
    """Base class of errors caused by the input or the environment, not by a defect of the software."""


class ConfigError(MlorqError):
    """A configuration key or value is wrong."""


class ModelError(MlorqError):
    """The model cannot be loaded or cannot be compressed."""


class DataError(MlorqError):
    """Calibration or evaluation data is missing, empty or malformed."""


class StoreError(MlorqError):
    """The artifact store cannot be read or written, or an artifact is damaged."""


class BudgetError(MlorqError):
    """No configuration fits the memory budget."""


class CheckpointError(MlorqError):
    """A compressed checkpoint is missing, is damaged, or does not fit the model it is loaded into."""


class TransientError(MlorqError):
    """A transient fault of a machine or a network, such as a killed worker: a retry may succeed."""


KINDS: dict[str, type[MlorqError]] = {
    kind.__name__: kind
    for kind in (ConfigError, ModelError, DataError, StoreError, BudgetError, CheckpointError, TransientError)
}


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, cut to 300 characters."""
    return " ".join(str(error).split())[:300]
