"""Errors that a user can act on.

Each is one clear line that names the key, file, layer or artifact at fault. The command line prints the
line and exits with status 2; everything else is a defect of the software and keeps its traceback.
"""

from __future__ import annotations


class MlorqError(Exception):
    """Base of all errors that are about the input and not about the software."""


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
    """A compressed checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class TransientError(MlorqError):
    """A fault of a machine or a network that may be gone at the next try, such as a worker that was killed."""


KINDS: dict[str, type[MlorqError]] = {
    kind.__name__: kind
    for kind in (ConfigError, ModelError, DataError, StoreError, BudgetError, CheckpointError, TransientError)
}
