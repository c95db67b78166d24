"""Calibration and evaluation data: one file per source, each a record in the registry ``SOURCES``.

``source`` defines sources and the keys that several of them share; ``base`` defines ``Dataset``, the result of loading
one. ``images`` builds batches of images for classifiers, ``label_maps`` for segmentation, ``depth_maps`` for depth,
``coco_images`` and ``coco_prompts`` for detectors and for models that boxes prompt (from files that ``coco_files``
reads), ``captioned`` for models of images and texts. ``texts`` builds batches of tokens, ``language`` cuts running text
into pieces, ``targets`` pairs texts with those to be generated, ``rankings`` has the texts of a search, ``speech`` and
``sounds`` build batches of recordings (decoded by ``recordings``), and ``memory`` wraps batches that exist already.
``choose`` selects samples, ``model_inputs`` gets preprocessing and tokenizers from the model's family, and ``metrics``
and ``average_precision`` compare outputs with labels.

Every command imports the modules of the sources; they import torch only when they load data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Registered in the order in which a configuration lists them.
from mlorq.data import (  # noqa: F401  # isort: skip
    image_folder,
    image_parquet,
    coco,
    captions,
    table,
    text_file,
    retrieval,
    audio,
    glue,
    synthetic,
    custom,
)
from mlorq.data.source import SOURCES, DataSource, SourceSettings, load_dataset
from mlorq.lazy import lazy_exports

if TYPE_CHECKING:
    from mlorq.data.base import Dataset
    from mlorq.data.memory import from_batches

__all__ = ["SOURCES", "DataSource", "Dataset", "SourceSettings", "from_batches", "load_dataset"]

_HOMES = {"Dataset": "mlorq.data.base", "from_batches": "mlorq.data.memory"}

__getattr__ = lazy_exports(__name__, _HOMES)
