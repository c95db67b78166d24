"""Optional packages, and the error if one is missing."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from mlorq.errors import DataError


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
        try:
            if importlib.util.find_spec(self.module) is not None:
                return importlib.import_module(self.module)
        except ImportError:
            pass
        otherwise = f", or {instead}" if instead else ""
        raise DataError(f"{needed_by} needs the package {self.module} (pip install 'mlorq[{self.extra}]'){otherwise}")


PYCOCOTOOLS = OptionalPackage("pycocotools", "detection")
SOUNDFILE = OptionalPackage("soundfile", "audio")
