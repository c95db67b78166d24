"""Calibration and evaluation data: one file per source, each a record in the registry ``SOURCES``.

``source`` says what a source is and has the keys that several share; ``base`` has what one gives, a ``Dataset``.
``images`` makes batches of images for classifiers, ``coco_images`` for detectors, ``texts`` of texts, and ``memory``
takes batches as they are. ``choose`` picks samples, ``model_inputs`` asks the model's family for preprocessing and
tokenizers, and ``metrics`` and ``average_precision`` compare outputs with labels.

The files of the sources are read for every command and import torch only when they load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Registered in the order in which a configuration lists them.
from mlorq.data import image_folder, image_parquet, coco, table, glue, custom  # noqa: F401  # isort: skip
from mlorq.data.source import SOURCES, DataSource, SourceSettings, load_dataset
from mlorq.lazy import lazy_exports

if TYPE_CHECKING:
    from mlorq.data.base import Dataset
    from mlorq.data.memory import from_batches

__all__ = ["SOURCES", "DataSource", "Dataset", "SourceSettings", "from_batches", "load_dataset"]

_HOMES = {"Dataset": "mlorq.data.base", "from_batches": "mlorq.data.memory"}

__getattr__ = lazy_exports(__name__, _HOMES)
