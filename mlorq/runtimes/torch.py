"""Runtime ``torch``: the compressed module itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlorq.registry import Settings
from mlorq.runtimes.base import RUNTIMES, Device, Runtime

if TYPE_CHECKING:
    from torch import nn


class Torch(Runtime[Settings]):
    """``mlorq.checkpoint.io.load``."""

    name = "torch"
    settings = Settings

    def load(self, location: str, model: nn.Module | None, device: Device, settings: Settings) -> nn.Module:
        from mlorq.checkpoint.io import load

        return load(location, model, device)


RUNTIMES.register(Torch())
