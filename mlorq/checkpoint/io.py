"""Writing, loading and inspection of checkpoints in folders or at fsspec URLs; ``format`` defines the two files."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from fsspec import AbstractFileSystem
from torch import Tensor, nn

from mlorq.artifacts.transfer import os_errors, put_file
from mlorq.checkpoint import places
from mlorq.checkpoint.description import Description, is_old_description, read_description
from mlorq.checkpoint.figures import count_unit, layer_figures, total_figures
from mlorq.checkpoint.filling import fill, prepare, sources
from mlorq.checkpoint.float_sizes import TensorSize, is_activation_quantizer, rest_by_kind
from mlorq.checkpoint.format import sizes_of, tensor_state
from mlorq.checkpoint.places import DESCRIPTION, OLD_DESCRIPTION, TENSORS, Location
from mlorq.checkpoint.preparation import ALLOWED, FOLDER
from mlorq.checkpoint.tensor_file import Header, read_header, read_tensor
from mlorq.errors import CheckpointError, ModelError
from mlorq.models.blank import META, Limits, blank_copy, shapes_copy, shapes_only, without_values
from mlorq.models.direct_weights import original_state
from mlorq.models.transposed import transposed_back
from mlorq.numbers import byte_count


def save(files: Mapping[str, bytes], location: Location) -> None:
    """Write a checkpoint's files into a folder, which is created if missing; other files in it are kept.

    An older description (``mlorq.json``, or ``config.json`` of format 1) is removed first and the new one is written
    last, so that the folder never mixes files of two checkpoints. An older checkpoint's tokenizer is removed.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _naming(location):
        fs, root = places.file_system(location)
        try:
            with os_errors():
                _save(files, location, fs, root)
        except OSError as error:
            raise CheckpointError(f"it cannot be written: {error}") from error


def _save(files: Mapping[str, bytes], location: Location, fs: AbstractFileSystem, root: str) -> None:
    fs.makedirs(root, exist_ok=True)
    if fs.exists(posixpath.join(root, DESCRIPTION)):
        fs.rm_file(posixpath.join(root, DESCRIPTION))
    old = places.read(location, OLD_DESCRIPTION)
    if DESCRIPTION in files and old is not None and is_old_description(old):
        fs.rm_file(posixpath.join(root, OLD_DESCRIPTION))
    for name in ALLOWED:
        stale = posixpath.join(root, FOLDER, name)
        if f"{FOLDER}/{name}" not in files and fs.exists(stale):
            fs.rm_file(stale)
    for name in sorted(files, key=lambda name: name == DESCRIPTION):
        path = posixpath.join(root, name)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        put_file(fs, path, files[name])


def load(location: Location, model: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The compressed model of a checkpoint, in eval mode.

    On the same device its outputs are bitwise equal to those of the saved module. A checkpoint is data: nothing that it
    names is imported, unpickled or fetched; sizes are compared with the file before memory is taken, and every tensor
    with its digest. No float weights of compressed layers are allocated. The model does not refer to the files.

    Args:
        location: folder or fsspec URL.
        model: a float instance of the architecture, which is not changed; required if the architecture is user code. By
            default the architecture is rebuilt from ``mlorq.json``.
        device: device of the returned model.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or does not fit the model; the message names the file,
            layer or tensor.
    """
    with _naming(location):
        description = read_description(location)
        with _tensors(location, description, whole=True) as (header, read):
            build = _builder(description, header, model)
            # First by shapes alone, so that everything is compared with the file before memory is taken.
            with META:
                shapes = prepare(build(values=False), description, header.tensors)
                names = sources(shapes, description, header.tensors)
            module = prepare(build(values=True), description, header.tensors)
            fill(module, description, names, read, complete=model is None)
        return module.to(device).eval()


def dense_state(location: Location) -> tuple[dict[str, Tensor], bool]:
    """The state dict of the float architecture with dequantized weights, from the files without building a module.

    Returns:
        The tensors by name, weights in the dtype in which their layers compute, and whether the checkpoint has
        activation quantizers, which are left out.

    Raises:
        CheckpointError: the checkpoint is missing or damaged; the message names the file, layer or tensor.
    """
    with _naming(location):
        description = read_description(location)
        if description.computed:
            raise CheckpointError(
                f"layer {description.computed[0]!r} computes its weight from its parameters (weight standardisation): "
                "no state dict of the original class has the same outputs; load the checkpoint with mlorq.load, or "
                "export it to onnx"
            )
        state: dict[str, Tensor] = {}
        with _tensors(location, description, whole=True) as (header, read):
            taken: set[str] = set()
            for entry in description.entries:
                dense = entry.dense({name: read(name) for name in entry.layout()})
                taken |= set(entry.layout())
                for path in (entry.layer, *entry.aliases):
                    state[f"{path}.weight"] = dense.clone()
            state |= {name: read(name) for name in header.tensors if name not in taken}
        aliases = description.config["aliases"]
        state |= {name: state[stored].clone() for name, stored in aliases.items() if stored in header.tensors}
        state = transposed_back(state, description.transposed)
        state = original_state(state, description.arranged)
        found = {name: value for name, value in state.items() if not is_activation_quantizer(name)}
        return found, len(found) < len(state) or description.plan is not None


def inspect(location: Location) -> dict[str, Any]:
    """The contents of ``mlorq.json``, with figures of its layers and of the whole checkpoint.

    Every row of ``layers`` has its bits per weight, multiply-accumulates and bit operations in addition, and
    ``totals`` those of the whole model (``mlorq.checkpoint.figures`` defines them). ``files`` has the bytes of each
    file, ``file_bytes`` their sum, and ``rest`` the bytes of the tensors that stay float, by kind
    (``mlorq.checkpoint.float_sizes``). Only ``mlorq.json`` and the header of ``model.safetensors`` are read, and all
    sizes are compared with the files.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or a size in ``mlorq.json`` is wrong.
    """
    with _naming(location):
        description = read_description(location)
        with _tensors(location, description, whole=False) as (header, _):
            pass
        files = {TENSORS: header.start + header.data_bytes, description.file: description.bytes}
        taken = set()
        for entry in description.entries:
            taken |= set(entry.layout())
            stored = sum(header.tensors[name].bytes for name in entry.layout())
            _check_size(f"layer {entry.layer!r} has", stored, entry.bytes)
        rest_bytes = header.data_bytes - sum(entry.bytes for entry in description.entries)
        actual_sizes = sizes_of(description.entries, rest_bytes, sum(files.values()) - header.data_bytes)
        for key, value in actual_sizes.items():
            _check_size(f"sizes.{key} is", value, description.config["sizes"].get(key))
        rest = {name: one for name, one in header.tensors.items() if name not in taken}
        weights = sum(
            math.prod(one.shape)
            for name, one in rest.items()
            if one.dtype.is_floating_point and not is_activation_quantizer(name)
        )
        per, plan = count_unit(description.entries), description.plan
        layers = [
            {**row, **layer_figures(entry, plan, per)}
            for row, entry in zip(description.config["layers"], description.entries, strict=True)
        ]
        return {
            **description.config,
            "layers": layers,
            "files": files,
            "file_bytes": sum(files.values()),
            "rest": rest_by_kind({name: TensorSize(one.shape, one.bytes) for name, one in rest.items()}),
            "totals": total_figures(layers, {"weights": weights, "bytes": rest_bytes}, plan, per),
        }


class _Builder(Protocol):
    def __call__(self, *, values: bool) -> nn.Module:
        """The float architecture: on the meta device, or with its buffers, but without values of parameters."""


def _builder(description: Description, header: Header, model: nn.Module | None) -> _Builder:
    """Builds the float architecture, from the description or from an instance."""
    from mlorq.models import rebuild

    paths = sum(1 + len(entry.aliases) for entry in description.entries)
    names = len(header.tensors) + len(description.config["aliases"]) + 2 * paths  # a weight and a bias
    sizes = [one.bytes for one in header.tensors.values()] + [entry.float_bytes for entry in description.entries]
    limits = Limits.of_file(names, max(sizes, default=0))

    def from_description() -> nn.Module:
        return rebuild(description.config["architecture"])

    def build(*, values: bool) -> nn.Module:
        if model is None:
            return (without_values if values else shapes_only)(from_description, limits)
        return blank_copy(model, tensor_state(model).values()) if values else shapes_copy(model)

    return build


@contextmanager
def _tensors(
    location: Location, description: Description, *, whole: bool
) -> Iterator[tuple[Header, Callable[[str], Tensor]]]:
    """The header of the tensors, compared with the description, and a function that reads a tensor.

    Args:
        location: of the checkpoint.
        description: of the checkpoint.
        whole: whether tensors will be read.
    """
    with places.opened(location, TENSORS, whole=whole) as (file, size):
        header = read_header(file, size)
        description.check_header(header)
        yield header, lambda name: read_tensor(file, header, name)


def _check_size(subject: str, actual: int, expected: Any) -> None:
    if actual != expected:
        stated = byte_count(expected) if isinstance(expected, int) else f"{expected!r:.100}"
        raise CheckpointError(f"it is damaged: {subject} {byte_count(actual)} instead of {stated}")


@contextmanager
def _naming(location: Location) -> Iterator[None]:
    """Name the checkpoint in errors."""
    try:
        yield
    except (CheckpointError, ModelError) as error:
        raise CheckpointError(f"checkpoint {location}: {error}") from error
