"""Runtime ``torch``: the compressed module itself."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mlorq.codecs.base import FLOAT_BYTES, Residency
from mlorq.registry import Settings
from mlorq.runtimes.base import RUNTIMES, Device, Runtime

if TYPE_CHECKING:
    from torch import nn

    from mlorq.runtimes.benchmark import Variant


class TorchSettings(Settings):
    """Options of the runtime."""

    weights: Literal["dense", "packed", "both"] = Field(
        "dense",
        description="dense: float matrices, decoded once (memory and time of the float model); packed: codes, decoded "
        "in every call (least memory, many times the time of a small batch); both: codes, and matrices once used",
    )
    precision: Literal["exact"] = Field("exact", description="torch computes with the exact values")


class TorchTarget(Settings):
    """Options of the runtime as a target."""

    weights: Literal["dense", "packed"] = Field(
        "dense", description="dense: float matrices; packed: codes, decoded in every call"
    )


class Torch(Runtime[TorchSettings]):
    """``mlorq.checkpoint.io.load``."""

    name = "torch"
    settings = TorchSettings
    as_target: ClassVar[type[Settings] | None] = TorchTarget

    def residency(self, settings: Settings) -> Residency:
        assert isinstance(settings, TorchTarget)
        return Residency(packed=settings.weights == "packed")

    def load(self, location: str, model: nn.Module | None, device: Device, settings: TorchSettings) -> nn.Module:
        from mlorq.checkpoint.io import load
        from mlorq.forms.in_memory import keep_in_memory, release_memory

        module = load(location, model, device)
        keep_in_memory(module, settings.weights)
        release_memory()
        return module

    def variants(self, checkpoint: str, folder: str) -> list[Variant]:
        from mlorq.checkpoint.io import inspect
        from mlorq.runtimes.benchmark import FLOAT, Variant

        about = inspect(checkpoint)
        weights = sum(prod(layer["shape"]) for layer in about["layers"])  # of layers and quantized tables
        size = FLOAT_BYTES * weights + about["sizes"]["rest_bytes"]
        compressed = [
            Variant(self.name, kept, self.name, checkpoint, about["file_bytes"], {"weights": kept})
            for kept in ("dense", "packed")
        ]
        return [Variant(self.name, FLOAT, self.name, checkpoint, size, None), *compressed]


RUNTIMES.register(Torch())
