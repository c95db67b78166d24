"""Target ``transformers``: a folder that ``AutoModel.from_pretrained`` loads after ``import mlorq``.

The folder has the files of Hugging Face's hub: ``config.json`` with a ``quantization_config``, ``model.safetensors``
with the packed codes, a model card, and the tokenizer or image processor if their source is given. Sentence encoders
also have the module files of sentence-transformers. The loaded model's outputs equal those of ``mlorq.load`` bit for
bit.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mlorq.export_targets.base import TARGETS, ExportTarget
from mlorq.registry import Settings


class TransformersConfig(Settings):
    """Options that a run's configuration may set."""

    source: str | None = Field(
        None,
        description="name or folder of the float model, as in the configuration: its tokenizer or image processor is "
        "copied",
    )
    data: str | None = Field(None, description="the calibration data in words, for the model card")


class TransformersSettings(TransformersConfig):
    """Options of the target."""

    result: str | None = Field(
        None,
        description="JSON file with the run's result (--json of mlorq compress) for the model card; default: the one "
        "in the store that the checkpoint is in",
    )
    push_to_hub: str | None = Field(None, description="repository USER/NAME to which the folder is uploaded")
    private: bool = Field(True, description="whether a repository that does not exist yet is created as a private one")


class Transformers(ExportTarget[TransformersSettings]):
    """A model folder for transformers."""

    name = "transformers"
    title = "folder for AutoModel.from_pretrained after import mlorq"
    settings = TransformersSettings
    configured: ClassVar[type[Settings] | None] = TransformersConfig
    locations: ClassVar[tuple[str, ...]] = ("source",)
    packages: ClassVar[tuple[str, ...]] = ("transformers",)

    def write(self, checkpoint: str, output: str, settings: TransformersSettings) -> list[str]:
        from mlorq.export_targets.transformers_folder import write_folder

        return write_folder(checkpoint, output, settings)


TARGETS.register(Transformers())
