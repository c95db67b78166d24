"""Writing, loading and inspection of checkpoints in folders or at fsspec URLs; ``format`` defines the two files."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from fsspec.core import url_to_fs
from torch import Tensor, nn

from mlorq.activations.plan import ActivationPlan
from mlorq.artifacts.store import put_file
from mlorq.checkpoint.entry import LayerEntry, dtype_of
from mlorq.checkpoint.float_sizes import TensorSize, is_activation_quantizer, rest_by_kind
from mlorq.checkpoint.format import CONFIG, FORMAT_VERSION, TENSORS, sizes_of, tensor_state
from mlorq.errors import CheckpointError, ModelError
from mlorq.forms.modules import (
    CompressedModule,
    compressed_class,
    install,
)

Location = str | os.PathLike[str]


def save(files: Mapping[str, bytes], location: Location) -> None:
    """Write a checkpoint's files into a folder, which is created if missing; other files in it are kept.

    An older ``config.json`` is removed first and the new one is written last, so that the folder never mixes files of
    two checkpoints.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    fs, root = _open(location)
    try:
        fs.makedirs(root, exist_ok=True)
        if fs.exists(posixpath.join(root, CONFIG)):
            fs.rm_file(posixpath.join(root, CONFIG))
        for name in sorted(files, key=lambda name: name == CONFIG):
            put_file(fs, posixpath.join(root, name), files[name])
    except OSError as error:
        raise CheckpointError(f"checkpoint {location} cannot be written: {error}") from error


def load(location: Location, model: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The compressed model of a checkpoint, in eval mode.

    On the same device its outputs are bitwise equal to those of the saved module.

    Args:
        location: folder or fsspec URL.
        model: a float instance of the architecture, which is copied before the layers are replaced; required if the
            architecture is user code. By default the architecture is rebuilt from ``config.json``.
        device: device of the returned model.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or does not fit the model; the message names the file,
            layer or tensor.
    """
    config, entries = _read_config(location)
    if model is not None:
        module = deepcopy(model)
    else:
        from mlorq.models import rebuild

        try:
            module = rebuild(config["architecture"])
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {location}: {error}") from error
    tensors = _read_tensors(location)
    try:
        for entry in entries:
            _install(module, entry)
        if config.get("activations"):
            ActivationPlan.from_json(config["activations"]).install(module)
        _fill(module, tensors, entries, config)
    except (CheckpointError, ModelError) as error:
        raise CheckpointError(f"checkpoint {location}: {error}") from error
    return module.to(device).eval()


def dense_state(location: Location) -> tuple[dict[str, Tensor], bool]:
    """The state dict of the float architecture with dequantized weights, from the files without building a module.

    Returns:
        The tensors by name, weights in the dtype in which their layers compute, and whether the checkpoint has
        activation quantizers, which are left out.

    Raises:
        CheckpointError: the checkpoint is missing or damaged; the message names the file, layer or tensor.
    """
    config, entries = _read_config(location)
    tensors = _read_tensors(location)
    state: dict[str, Tensor] = {}
    for entry in entries:
        lacking = [name for name in entry.tensor_names(entry.layer) if name not in tensors]
        if lacking:
            raise CheckpointError(f"checkpoint {location}: {TENSORS} lacks tensor {lacking[0]!r}")
        dense = entry.dense({name: tensors.pop(name) for name in entry.tensor_names(entry.layer)})
        for path in (entry.layer, *entry.aliases):
            state[f"{path}.weight"] = dense.clone()
    rest = {name: tensors[stored] for name, stored in config["aliases"].items() if stored in tensors}
    state |= tensors | {name: value.clone() for name, value in rest.items()}
    found = {name: value for name, value in state.items() if not is_activation_quantizer(name)}
    return found, len(found) < len(state) or bool(config.get("activations"))


def inspect(location: Location) -> dict[str, Any]:
    """The contents of ``config.json``, with ``files`` (bytes of each), ``file_bytes`` (their sum) and ``rest`` added.

    ``rest`` has the bytes of the tensors that stay float, by kind (``mlorq.checkpoint.float_sizes``). Only
    ``config.json`` and the header of ``model.safetensors`` are read, and all sizes are compared with the files.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or a size in ``config.json`` is wrong.
    """
    config, entries = _read_config(location)
    fs, root = _open(location)
    files = {name: _size(location, name) for name in (TENSORS, CONFIG)}
    try:
        length = int.from_bytes(fs.cat_file(posixpath.join(root, TENSORS), 0, 8), "little")
        header = json.loads(fs.cat_file(posixpath.join(root, TENSORS), 8, min(8 + length, files[TENSORS])))
        spans = {name: value["data_offsets"] for name, value in header.items() if name != "__metadata__"}
        sizes = {name: end - begin for name, (begin, end) in spans.items()}
        shapes = {name: tuple(header[name]["shape"]) for name in spans}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {location}: {TENSORS} is damaged: {error}") from error
    tensor_bytes = max((end for _, end in spans.values()), default=0)
    _check_size(location, f"{TENSORS} has", files[TENSORS], 8 + length + tensor_bytes)
    for entry in entries:
        stored = sum(sizes.get(name, 0) for name in entry.tensor_names(entry.layer))
        _check_size(location, f"layer {entry.layer!r} has", stored, entry.bytes)
    rest_bytes = tensor_bytes - sum(entry.bytes for entry in entries)
    actual_sizes = sizes_of(entries, rest_bytes, sum(files.values()) - tensor_bytes)
    for key, value in actual_sizes.items():
        _check_size(location, f"sizes.{key} is", value, config["sizes"].get(key))
    taken = {name for entry in entries for name in entry.tensor_names(entry.layer)}
    rest = {name: TensorSize(shapes[name], size) for name, size in sizes.items() if name not in taken}
    return {**config, "files": files, "file_bytes": sum(files.values()), "rest": rest_by_kind(rest)}


def _install(module: nn.Module, entry: LayerEntry) -> None:
    """Replace a layer of a float model by an empty compressed one."""

    def make(layer: nn.Module, path: str) -> CompressedModule:
        cls = compressed_class(layer, path)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if cls.kind != entry.kind or tuple(weight.shape) != entry.shape:
            raise CheckpointError(
                f"layer {path!r} is {cls.kind} {tuple(weight.shape)} in the model, "
                f"but {entry.kind} {entry.shape} in the checkpoint"
            )
        new = cls.placeholder(layer, path, entry.candidate, entry.zero_point)
        new.compute_dtype = dtype_of(entry.dtype)
        return new

    install(module, entry.layer, (entry.layer, *entry.aliases), make)


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], entries: Sequence[LayerEntry], config: Mapping[str, Any]
) -> None:
    """Load the tensors into a model with compressed layers; their names must be exactly the model's."""
    quantized = {name for entry in entries for name in entry.tensor_names(entry.layer)}
    given = _named_tensors(tensors, entries, config["aliases"])
    expected = tensor_state(module)
    _refuse_names("lacks tensors that the model has", set(expected) - set(given))
    _refuse_names("has tensors that the model lacks", set(given) - set(expected))
    held: dict[int, Tensor] = {}
    for name, target in expected.items():
        value = given[name]
        fault = _fault(value, target, held.setdefault(id(target), value), is_quantized=name in quantized)
        if fault:
            raise CheckpointError(f"tensor {name!r} {fault}")
        if value.dtype != target.dtype:
            target.data = target.data.to(value.dtype)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name in config["buffers"]:  # not stored, but cast like those of the saved model
            buffer.data = buffer.data.to(dtype_of(config["buffers"][name]))
    module.load_state_dict(given, strict=True)


def _named_tensors(
    tensors: Mapping[str, Tensor], entries: Sequence[LayerEntry], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """Stored tensors by all of their names in the model."""
    stored_as = dict(aliases)
    for entry in entries:
        for path in entry.aliases:
            stored_as |= dict(zip(entry.tensor_names(path), entry.tensor_names(entry.layer), strict=True))
    return dict(tensors) | {name: tensors[stored] for name, stored in stored_as.items() if stored in tensors}


def _refuse_names(problem: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(repr(name) for name in sorted(names)[:5]) + (", …" if len(names) > 5 else "")
        raise CheckpointError(f"{TENSORS} {problem}: {shown}")


def _fault(value: Tensor, target: Tensor, first: Tensor, *, is_quantized: bool) -> str | None:
    """Mismatch of a stored tensor and the model's, or None.

    Args:
        value: the stored tensor.
        target: the model's tensor of that name.
        first: the first stored tensor of those that share ``target``.
        is_quantized: whether it is part of a compressed layer, whose dtypes must be equal.
    """
    floating = value.is_floating_point() and target.is_floating_point()
    if value.shape != target.shape:
        return f"has shape {tuple(value.shape)}; the model needs {tuple(target.shape)}"
    if value.dtype != target.dtype and (not floating or is_quantized):
        return f"is {value.dtype}; the model needs {target.dtype}"
    if is_quantized and floating and not (value.isfinite() & (value > 0)).all():
        return "has scales that are not positive and finite"
    if first is not value and not torch.equal(first, value):
        return "is shared in the model but not in the checkpoint"
    return None


def _read_tensors(location: Location) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors.torch.load(_read(location, TENSORS))
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {location}: {TENSORS} is damaged: {error}") from error
    return found


def _read_config(location: Location) -> tuple[dict[str, Any], list[LayerEntry]]:
    text = _read(location, CONFIG)
    try:
        config = json.loads(text)
        version = config["format_version"]
        if version == FORMAT_VERSION:
            types = {"architecture": dict, "sizes": dict, "aliases": dict, "buffers": dict}
            wrong = [key for key, kind in types.items() if not isinstance(config[key], kind)]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} must be an object")
            for dtype in config["buffers"].values():
                dtype_of(dtype)
            ActivationPlan.from_json(config.get("activations") or {"sites": [], "folds": []}).check()
            return config, [LayerEntry.from_json(row) for row in config["layers"]]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"checkpoint {location}: {CONFIG} is damaged: {reason}") from error
    raise CheckpointError(
        f"checkpoint {location} has format version {version!r}; this version of mlorq reads {FORMAT_VERSION}"
    )


def _check_size(location: Location, subject: str, actual: int, expected: Any) -> None:
    if actual != expected:
        raise CheckpointError(f"checkpoint {location} is damaged: {subject} {actual} bytes instead of {expected}")


# -- files and names ----------------------------------------------------------------------------------------


def _open(location: Location) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, root = url_to_fs(os.fspath(location))
        return fs, str(root)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"checkpoint {location}: {error}") from error


def _read(location: Location, name: str) -> bytes:
    fs, root = _open(location)
    try:
        return bytes(fs.cat_file(posixpath.join(root, name)))
    except (FileNotFoundError, NotADirectoryError) as error:
        there = f"the folder has no {name}" if fs.isdir(root) else "the folder does not exist"
        raise CheckpointError(f"checkpoint {location}: {there}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {location}: {name} cannot be read: {error}") from error


def _size(location: Location, name: str) -> int:
    fs, root = _open(location)
    try:
        return int(fs.size(posixpath.join(root, name)))
    except OSError as error:
        raise CheckpointError(f"checkpoint {location}: {name} is missing or cannot be read: {error}") from error
