"""Model folders whose weights have the dtype that the model runs in, so that a library maps them into memory.

transformers maps weights of a model's own dtype from their files and reads them when they are used. Others it converts,
all of them at once: twice the model in memory, where a bound was set (``mlorq.models.offload``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlorq.scratch import scratch_folder

INDEX = "model.safetensors.index.json"
OTHER_FILES = ("subfolder", "variant", "gguf_file", "use_safetensors")  # arguments that name other files of a model


@contextmanager
def in_dtype(location: str, dtype: torch.dtype, arguments: Mapping[str, Any]) -> Iterator[str]:
    """A folder with the model of another one, its weights of one dtype: the same folder if they have it already.

    Args:
        location: folder, or name on the hub.
        dtype: of the floating-point weights.
        arguments: of the call that loads the model.

    Raises:
        OSError: the hub does not have the model.
        safetensors.SafetensorError: its weights cannot be read.
    """
    import safetensors.torch

    folder = Path(location if os.path.isdir(location) else _downloaded(location, arguments))
    files = sorted(folder.glob("*.safetensors"))
    if any(name in arguments for name in OTHER_FILES) or not any(_differs(file, dtype) for file in files):
        yield location
        return
    with scratch_folder() as made:
        for file in folder.iterdir():
            if file not in files and file.name != INDEX:
                (Path(made) / file.name).symlink_to(file.resolve())
        places: dict[str, str] = {}
        for file in files:  # one file per tensor: only one is in memory at a time
            with safetensors.safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    value = tensors.get_tensor(name)
                    value = value.to(dtype) if value.is_floating_point() else value
                    places[name] = f"model-{len(places):06}.safetensors"
                    safetensors.torch.save_file({name: value}, Path(made) / places[name], {"format": "pt"})
        (Path(made) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        yield made


def _downloaded(name: str, arguments: Mapping[str, Any]) -> str:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    return snapshot_download(name, revision=arguments.get("revision"), allow_patterns=patterns)


def _differs(file: Path, dtype: torch.dtype) -> bool:
    """Whether a file has floating-point tensors of another dtype."""
    import safetensors

    with safetensors.safe_open(file, "pt") as tensors:
        return any(
            value.is_floating_point() and value.dtype != dtype
            for value in (tensors.get_tensor(name) for name in tensors.keys())  # noqa: SIM118 (no mapping)
        )
