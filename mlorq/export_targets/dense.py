"""Target ``dense``: the float model's own state dict, with the weights that the codes give, in one safetensors file.

It has the size of the float model. Any code that loads the float model's weights loads it, so that a compressed model
can be tried, or converted further, without this software. Quantized activations are not part of a state dict.
"""

from __future__ import annotations

import posixpath
from typing import Literal

from pydantic import Field

from mlorq.errors import CheckpointError
from mlorq.export_targets.base import TARGETS, ExportTarget
from mlorq.registry import Settings


class DenseSettings(Settings):
    """Options of the target."""

    dtype: Literal["stored", "float32", "float16", "bfloat16"] = Field(
        "stored", description="of floating tensors; stored: that in which each layer computes"
    )


class Dense(ExportTarget[DenseSettings]):
    """A state dict of dense weights."""

    name = "dense"
    title = "state dict of the float architecture (safetensors)"
    settings = DenseSettings
    suffixes = (".safetensors",)

    def write(self, checkpoint: str, output: str, settings: DenseSettings) -> list[str]:
        import torch
        from fsspec.core import url_to_fs

        from mlorq.artifacts.store import put_file, tensors_bytes
        from mlorq.checkpoint.io import dense_state

        state, dropped = dense_state(checkpoint)
        if dropped:
            raise CheckpointError(
                f"checkpoint {checkpoint} quantizes its activations, which a state dict of weights cannot hold: "
                "load it with mlorq.load"
            )
        if settings.dtype != "stored":
            dtype = getattr(torch, settings.dtype)
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        try:
            fs, path = url_to_fs(output)
            fs.makedirs(posixpath.dirname(path) or ".", exist_ok=True)
            put_file(fs, path, tensors_bytes(state))
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"{output} cannot be written: {error}") from error
        return [output]


TARGETS.register(Dense())
