"""Float models: one file per model family, and analysis of models of any family.

A family (``family.py``) is an entry of the registry ``FAMILIES``: its keys of the ``model`` section, how it loads a
model and rebuilds one from a description, and which inputs its models take. ``timm.py``, ``transformers.py``,
``detection.py`` and ``custom.py`` are the families; they import the files that need torch when called.
``layers``, ``blocks``, ``partial_forward`` and ``prefetch`` work with modules of all families.

Importing this package does not import torch: the functions below are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.lazy import lazy_exports
from mlorq.models import custom, detection, timm, transformers
from mlorq.models.family import FAMILIES, ModelFamily
from mlorq.models.known import known_models

__all__ = ["FAMILIES", "FloatModel", "ModelFamily", "from_module", "known_models", "load_model", "rebuild"]

if TYPE_CHECKING:
    from mlorq.models.base import FloatModel
    from mlorq.models.loading import from_module, load_model, rebuild

for _family in (timm.Timm(), transformers.Transformers(), detection.Detection(), custom.Custom()):
    FAMILIES.register(_family)

_HOMES = {
    "FloatModel": "mlorq.models.base",
    "from_module": "mlorq.models.loading",
    "load_model": "mlorq.models.loading",
    "rebuild": "mlorq.models.loading",
}
__getattr__ = lazy_exports(__name__, _HOMES)
