"""Data sources: one file each, one line in the registry."""

from __future__ import annotations

from mlorq.config.run import ModelConfig, SourceConfig
from mlorq.data import coco, custom, glue, image_folder, image_parquet, table
from mlorq.data.base import Dataset
from mlorq.data.memory import Role, check_size, from_batches
from mlorq.models.base import FloatModel

__all__ = ["Dataset", "from_batches", "load_dataset"]

SOURCES = {
    "image_folder": image_folder.load,
    "image_parquet": image_parquet.load,
    "coco": coco.load,
    "table": table.load,
    "glue": glue.load,
    "custom": custom.load,
}


def load_dataset(
    source: SourceConfig, role: Role, model: FloatModel, model_config: ModelConfig, folder: str, seed: int
) -> Dataset:
    """Load the data that a configuration names, in the form that the model takes.

    Args:
        source: the ``calibration`` or ``evaluation`` section.
        role: which of the two; evaluation data has a metric.
        model: the float model.
        model_config: its configuration (preprocessing, tokenizer, task).
        folder: where relative paths start.
        seed: of the choice of ``samples``.

    Raises:
        DataError: the data is missing, malformed or too small, or evaluation data has labels that the model cannot
            give. Labels of calibration data, which few costs look at, are for the caller to check.
    """
    found = SOURCES[source.source](source, role, model_config, folder, seed)
    if role == "calibration":
        check_size(found.samples, role)
    else:
        found.check_labels(model)
    return found
