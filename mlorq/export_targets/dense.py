"""Target ``dense``: the state dict of the float architecture with dequantized weights, in one safetensors file.

The file is as large as the float model. Any code that loads weights of the float model can load it, to evaluate or
convert the compressed model without this software. A state dict cannot represent quantized activations.
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
        "stored", description="dtype of floating tensors; stored: the dtype in which each layer computes"
    )


class Dense(ExportTarget[DenseSettings]):
    """State dict of dequantized weights."""

    name = "dense"
    title = "state dict of the float architecture (safetensors)"
    settings = DenseSettings
    suffixes = (".safetensors",)

    def write(self, checkpoint: str, output: str, settings: DenseSettings) -> list[str]:
        import torch
        from fsspec.core import url_to_fs

        from mlorq.artifacts.store import tensors_bytes
        from mlorq.artifacts.transfer import os_errors, put_file
        from mlorq.checkpoint.io import dense_state

        state, dropped = dense_state(checkpoint)
        if dropped:
            raise CheckpointError(
                f"checkpoint {checkpoint} has quantized activations, which a state dict cannot represent: "
                "load it with mlorq.load"
            )
        if settings.dtype != "stored":
            dtype = getattr(torch, settings.dtype)
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        try:
            with os_errors():
                fs, path = url_to_fs(output)
                fs.makedirs(posixpath.dirname(path) or ".", exist_ok=True)
                put_file(fs, path, tensors_bytes(state))
        except (OSError, ImportError) as error:
            raise CheckpointError(f"{output} cannot be written: {error}") from error
        return [output]


TARGETS.register(Dense())
