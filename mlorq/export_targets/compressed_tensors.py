"""Target ``compressed-tensors``: a model folder in the format of the package of that name, which needs no ``mlorq``.

The format has one bit-width for all layers, so that the target takes uniform models only: linear layers of form ``Q``
with the same bits. The numbers are exactly those of the checkpoint. transformers dequantizes them when it loads the
folder.
"""

from __future__ import annotations

from typing import ClassVar

from mlorq.export_targets.base import TARGETS, ExportTarget
from mlorq.export_targets.transformers import TransformersConfig, TransformersSettings
from mlorq.registry import Settings


class CompressedTensors(ExportTarget[TransformersSettings]):
    """A model folder in the format ``pack-quantized``."""

    name = "compressed-tensors"
    title = "folder for transformers and the package compressed-tensors; uniform models only"
    settings = TransformersSettings
    configured: ClassVar[type[Settings] | None] = TransformersConfig
    locations: ClassVar[tuple[str, ...]] = ("source",)

    def write(self, checkpoint: str, output: str, settings: TransformersSettings) -> list[str]:
        from mlorq.export_targets.compressed_tensors_state import pack_quantized
        from mlorq.export_targets.transformers_folder import write_folder

        return write_folder(checkpoint, output, settings, pack_quantized)


TARGETS.register(CompressedTensors())
