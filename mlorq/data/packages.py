"""Optional packages, and the error if one is missing."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from mlorq.errors import DataError
from mlorq.extras import install_command


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some data sources need.

    Attributes:
        module: its import name.
        extra: the extra of mlorq that installs it.
    """

    module: str
    extra: str

    def require(self, needed_by: str, instead: str = "") -> Any:
        """The imported module.

        Args:
            needed_by: the feature that needs it, for the error.
            instead: an alternative for the user, for the error.

        Raises:
            DataError: it cannot be imported.
        """
        self.find(needed_by, instead)
        try:
            return importlib.import_module(self.module)
        except ImportError:
            raise self._missing(needed_by, instead) from None

    def find(self, needed_by: str, instead: str = "") -> None:
        """Check that it is installed, without importing it; arguments and errors as those of ``require``."""
        try:
            if importlib.util.find_spec(self.module) is not None:
                return
        except ImportError:
            pass
        raise self._missing(needed_by, instead)

    def _missing(self, needed_by: str, instead: str) -> DataError:
        otherwise = f", or {instead}" if instead else ""
        return DataError(f"{needed_by} needs the package {self.module} ({install_command(self.extra)}){otherwise}")


PYCOCOTOOLS = OptionalPackage("pycocotools", "detection")
SOUNDFILE = OptionalPackage("soundfile", "audio")
EVALUATE = OptionalPackage("evaluate", "metrics")
TORCHMETRICS = OptionalPackage("torchmetrics", "metrics")
