"""Changes to a checkpoint whose digests are then right again: what a digest cannot notice has to be noticed as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from mlorq.artifacts.store import json_bytes
from mlorq.checkpoint.format import json_lines
from mlorq.checkpoint.places import DESCRIPTION, OLD_DESCRIPTION, TENSORS
from mlorq.checkpoint.tensor_file import ENTRY, digest, header_text, metadata, parts


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in ``mlorq.json``."""
    config = json.loads((folder / DESCRIPTION).read_text())
    change(config)
    (folder / DESCRIPTION).write_bytes(json_lines(config))
    sign(folder)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors."""
    own = own_metadata(folder)
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    sign(folder, own["layers"])


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> None:
    """Change the header of the tensors: dtype, shape and offsets by name, and the metadata."""
    data = (folder / TENSORS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    own = json.loads(header.pop("__metadata__")[ENTRY])
    own = metadata(header, own["layers"], own["digests"].split(), own["description"]) if signed else own
    (folder / TENSORS).write_bytes(header_text(header, own) + data[start:])


def own_metadata(folder: Path) -> dict[str, Any]:
    """The entry of the header that identifies the content."""
    with safetensors.safe_open(folder / TENSORS, "pt") as file:
        return json.loads(file.metadata()[ENTRY])


def sign(folder: Path, layers: dict[str, Any] | None = None) -> None:
    """Write digests of the files as they are.

    Args:
        folder: the checkpoint.
        layers: candidates and shapes in the header; default: those that are there.
    """
    layers = own_metadata(folder)["layers"] if layers is None else layers
    table, body, digests = parts(unsigned(folder))
    own = metadata(table, layers, digests, digest((folder / DESCRIPTION).read_bytes()))
    (folder / TENSORS).write_bytes(header_text(table, own) + body)


def unsigned(folder: Path) -> bytes:
    """The file of tensors as other software writes it, without metadata."""
    return safetensors.torch.save(safetensors.torch.load_file(folder / TENSORS))


def as_format_1(folder: Path) -> None:
    """Turn a checkpoint into one of format 1, in place."""
    config = json.loads((folder / DESCRIPTION).read_text())
    plain = unsigned(folder)
    sizes = config["sizes"]
    tensor_bytes = sum(value for key, value in sizes.items() if key not in ("overhead_bytes", "float_bytes"))
    config["format_version"] = 1
    while True:
        text = json_bytes(config)
        overhead = len(plain) - tensor_bytes + len(text)
        if sizes["overhead_bytes"] == overhead:
            break
        sizes["overhead_bytes"] = overhead
    (folder / TENSORS).write_bytes(plain)
    (folder / OLD_DESCRIPTION).write_bytes(text)
    (folder / DESCRIPTION).unlink()
