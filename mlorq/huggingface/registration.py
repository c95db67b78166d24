"""Registration of the quantizer in transformers, without importing transformers.

``import mlorq`` has to stay fast, and the quantizer's base class imports torch. The quantizer is therefore registered
at once if transformers has loaded its table of quantizers, and else when it loads it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"  # the module with the tables of quantizers


def register_when_imported() -> None:
    """Register the quantizer ``mlorq`` in transformers, now or when transformers is imported.

    Further calls change nothing.
    """
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    # If the quantizer's own import of transformers led here, it is registered when its import ends.
    importlib.import_module("mlorq.huggingface.quantizer")


class _Watcher(MetaPathFinder):
    """Finds no module itself: adds the registration to the loading of ``TABLE``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - a method of its type
        return spec
