"""Putting a checkpoint's tensors into a module whose parameters have no values yet (``mlorq.models.blank``).

``prepare`` replaces the compressed layers of a float model, and ``sources`` finds the stored tensor of every name in
its state. Both look at names, shapes and dtypes only, so that all of a checkpoint is checked before tensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.checkpoint.description import Description
from mlorq.checkpoint.entry import LayerEntry, dtype_of
from mlorq.checkpoint.format import tensor_state
from mlorq.checkpoint.places import TENSORS
from mlorq.checkpoint.tensor_file import StoredTensor
from mlorq.errors import CheckpointError, one_line
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import compressed_class, install
from mlorq.models.computed_weights import merge_computed_weights
from mlorq.models.direct import weight_of
from mlorq.models.direct_weights import arrange
from mlorq.models.library_layers import simplify_library_layers
from mlorq.models.transposed import transpose_conv1d


def prepare(module: nn.Module, description: Description, stored: Collection[str]) -> nn.Module:
    """A float model with its compressed layers and activation quantizers, all empty; the module is changed in place.

    Args:
        module: the float model.
        description: of the checkpoint.
        stored: names of the stored tensors.

    Raises:
        CheckpointError, ModelError: a layer is not in the model, or has another kind or shape there.
    """
    transpose_conv1d(module, values=False, only=description.transposed)
    arrange(module, description.arranged, values=False)
    replaced = {f"{path}.weight" for entry in description.entries for path in (entry.layer, *entry.aliases)}
    merge_computed_weights(module, {*stored, *description.config["aliases"], *replaced})
    paths = {path for entry in description.entries for path in (entry.layer, *entry.aliases)}
    simplify_library_layers(module, paths | set(description.computed))
    for entry in description.entries:
        _install(module, entry)
    if description.plan is not None:
        description.plan.install(module)
    return module


def sources(module: nn.Module, description: Description, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """For each name in the state of a prepared module, the name of the stored tensor.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or has another shape or dtype.
    """
    quantized, found = _quantized(description.entries), _names(description, stored)
    expected = tensor_state(module)
    _refuse_names("lacks tensors that the model has", set(expected) - set(found))
    _refuse_names("has tensors that the model lacks", set(found) - set(expected))
    for name, target in expected.items():
        value = stored[found[name]]
        if value.shape != target.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(value.shape)}; the model needs {tuple(target.shape)}"
            )
        floating = value.dtype.is_floating_point and target.is_floating_point()
        if value.dtype != target.dtype and (not floating or found[name] in quantized):
            raise CheckpointError(f"tensor {name!r} is {value.dtype}; the model needs {target.dtype}")
    return found


def fill(
    module: nn.Module,
    description: Description,
    names: Mapping[str, str],
    read: Callable[[str], Tensor],
    *,
    complete: bool,
) -> None:
    """Put the stored tensors into a prepared module; what it shares stays shared.

    Args:
        module: the module, which is changed in place.
        description: of the checkpoint.
        names: result of ``sources``.
        read: returns a stored tensor, in memory of its own.
        complete: whether all of the module's parameters must be filled.

    Raises:
        CheckpointError: a scale is not positive and finite, two tensors differ that the model shares, or a parameter
            has no value.
    """
    quantized = _quantized(description.entries)
    targets: dict[str, list[tuple[str, Tensor]]] = {}
    for name, target in tensor_state(module).items():
        targets.setdefault(names[name], []).append((name, target))
    filled: dict[int, Tensor] = {}
    for stored, receiving in targets.items():
        value, is_put = read(stored), False
        if stored in quantized and value.is_floating_point() and not (value.isfinite() & (value > 0)).all():
            raise CheckpointError(f"tensor {stored!r} has scales that are not positive and finite")
        for name, target in receiving:
            if id(target) not in filled:
                # Names of one tensor in the file may be several tensors in the model, which can then change apart.
                target.data = value.clone() if is_put else value
                filled[id(target)], is_put = value, True
            elif filled[id(target)] is not value and not torch.equal(filled[id(target)], value):
                raise CheckpointError(f"tensor {name!r} is shared in the model but not in the checkpoint")
    buffers = description.config["buffers"]
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name in buffers:  # not stored, but cast like those of the saved model
            buffer.data = buffer.data.to(dtype_of(buffers[name]))
    for name, parameter in module.named_parameters():
        if complete and id(parameter) not in filled:
            raise CheckpointError(f"the model's parameter {name!r} is not part of its state: pass model=instance")
    try:
        module.load_state_dict(tensor_state(module), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the model does not take its state: {one_line(error)}") from error


def _install(module: nn.Module, entry: LayerEntry) -> None:
    """Replace a layer of a float model by an empty compressed one."""

    def make(layer: nn.Module, path: str) -> CompressedModule:
        cls = compressed_class(layer, path)
        weight = weight_of(layer)
        if cls.kind != entry.kind or tuple(weight.shape) != entry.shape:
            raise CheckpointError(
                f"layer {path!r} is {cls.kind} {tuple(weight.shape)} in the model, "
                f"but {entry.kind} {entry.shape} in the checkpoint"
            )
        new = cls.placeholder(layer, path, entry.candidate, entry.zero_point)
        new.compute_dtype = dtype_of(entry.dtype)
        return new

    install(module, entry.layer, (entry.layer, *entry.aliases), make)


def _quantized(entries: Sequence[LayerEntry]) -> set[str]:
    return {name for entry in entries for name in entry.layout()}


def _names(description: Description, stored: Mapping[str, Any]) -> dict[str, str]:
    """Stored tensors by all of their names in the model."""
    stored_as = dict(description.config["aliases"])
    for entry in description.entries:
        for path in entry.aliases:
            stored_as |= dict(zip(entry.tensor_names(path), entry.layout(), strict=True))
    return {name: name for name in stored} | {name: one for name, one in stored_as.items() if one in stored}


def _refuse_names(problem: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(repr(name) for name in sorted(names)[:5]) + (", …" if len(names) > 5 else "")
        raise CheckpointError(f"{TENSORS} {problem}: {shown}")
