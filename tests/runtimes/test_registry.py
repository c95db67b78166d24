"""A runtime from outside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

import mlorq
from mlorq.registry import Settings
from mlorq.runtimes import RUNTIMES, Runtime
from tests.compressed import compressed, folder_of
from tests.nets import SharedNet


class DoubleSettings(Settings):
    """Options of the runtime."""

    factor: float = Field(2.0, description="of the outputs")


class Double(Runtime[DoubleSettings]):
    """The torch model with its outputs multiplied."""

    name = "double"
    settings = DoubleSettings

    def load(self, location: str, model: nn.Module | None, device: Any, settings: DoubleSettings) -> Any:
        module = mlorq.load(location, model, device)
        return lambda x: settings.factor * module(x)


def test_a_registered_runtime_loads_checkpoints(tmp_path: Path) -> None:
    net = SharedNet(16)
    module = compressed(net)
    folder_of(tmp_path, module, {"family": "custom"})
    x = torch.randn(2, 3, 16)
    with RUNTIMES.added(Double()):
        assert torch.equal(mlorq.load(tmp_path, net, runtime="double")(x), 2 * module(x))
        assert torch.equal(mlorq.load(tmp_path, net, runtime="double", factor=3)(x), 3 * module(x))
