"""Bounds on the size of a checkpoint before its layers are compressed (METHOD 2).

``rest_upper_bound`` bounds all but the bytes of the compressible layers' weights, so that a budget can limit the size
of the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.checkpoint.entry import EMBEDDING, LayerEntry, dtype_name
from mlorq.checkpoint.float_sizes import TensorSize
from mlorq.checkpoint.format import HASH_KEYS, description_bytes, sizes_of, stored_once, tensor_state
from mlorq.checkpoint.tensor_file import ALIGNED, DTYPES, compact, digest, header_text, metadata
from mlorq.codecs.affine import storage_for
from mlorq.codecs.base import Accounting, Storage
from mlorq.forms.base import FORMS, Shape, uniform_candidate
from mlorq.forms.modules import compressed_class, get_layer, shared_names
from mlorq.models.direct import weight_of
from mlorq.models.kinds import BY_NAME

MOST = 10**15  # has at least as many digits as any number of bytes or multiply-accumulates
LONGEST_DTYPE = max(DTYPES, key=len)


def rest_upper_bound(
    module: nn.Module,
    layers: Mapping[str, Sequence[str]],
    description: Mapping[str, Any],
    *,
    accounting: Accounting = "exact",
    tables: Mapping[str, int] | None = None,
    extra_bytes: int = 4096,
) -> int:
    """Upper bound in bytes of a checkpoint without its compressible layers' weights, for any allocation.

    For every allocation ``folder <= rest_upper_bound(…) + Σ candidate_bytes(…, accounting, …)``. The bound is the sum
    of the tensors that stay float and of the headers if each layer has the form with the longest description and all
    numbers have the most digits. It exceeds the exact size by some hundred bytes per layer.

    Args:
        module: the float model, in the dtype in which it will be saved.
        layers: the names of the compressible layers, each with its aliases.
        description: as for ``checkpoint_files``, as far as it is known.
        accounting: how the bytes of candidates are counted; with ``paper`` this bound includes the scales, zero-points
            and padding that the count omits.
        tables: bit-widths of the embedding tables to be quantized, by name; this bound includes their bytes.
        extra_bytes: room for additions of the final description, other than the keys of budget and hashes.

    Raises:
        ModelError: a layer is not in the model.
        CheckpointError: as for ``checkpoint_files``.
    """
    names = shared_names(module, layers, layers)
    state = _float_state(module, names, tables or {})
    rest, aliases = stored_once(state)
    for name, stored in aliases.items():
        # Moving a module keeps parameters shared only if they are the same object.
        if state[name] is not state[stored] or not isinstance(state[name], nn.Parameter):
            rest[name] = state[name]
    entries = [_longest_entry(module, name, further) for name, (_, *further) in names.items()]
    quantized = [_table_entry(module, name, bits) for name, bits in (tables or {}).items()]
    unpaid = sum(entry.bytes for entry in quantized)
    if accounting == "paper":
        unpaid += sum(_unpaid(entry) for entry in entries)
    entries += quantized
    shapes = {name: list(tensor.shape) for name, tensor in rest.items()}
    for entry in entries:
        numbers = torch.Size(entry.shape).numel()
        shapes |= {tensor: [numbers, numbers] for tensor in entry.tensor_names(entry.layer)}
    header = _header_bound(shapes, entries)
    config = description_bytes(
        module, entries, aliases, dict.fromkeys(sizes_of(entries, 0, 0), MOST), _longest(description)
    )
    return sum(tensor.nbytes for tensor in rest.values()) + unpaid + header + len(config) + extra_bytes


def _longest_entry(module: nn.Module, name: str, further: Sequence[str]) -> LayerEntry:
    """The entry with the longest description, over all forms that suit the layer."""
    layer = get_layer(module, name)
    weight = weight_of(layer)
    kind, dtype = compressed_class(layer, name).kind, dtype_name(weight.dtype)
    shape = Shape(*BY_NAME[kind].matrix_shape(weight.shape))
    matrix = BY_NAME[kind].to_matrix(weight)
    stored = "int16" if weight.is_meta else storage_for(matrix, "int16")
    entries = [
        LayerEntry(name, kind, tuple(weight.shape), form.largest(shape), stored, dtype, MOST, tuple(further), MOST)
        for form in FORMS
        if form.serves(shape)
    ]
    return max(entries, key=_described_bytes)


def _table_entry(module: nn.Module, name: str, bits: int) -> LayerEntry:
    """The entry of a quantized embedding table."""
    weight = get_layer(module, name).weight
    assert isinstance(weight, Tensor)
    candidate = uniform_candidate(bits)
    size = FORMS[candidate.form].size(candidate, Shape(weight.shape[0], weight.shape[1]), Storage())
    return LayerEntry(name, EMBEDDING, tuple(weight.shape), candidate, "codes", dtype_name(weight.dtype), size, ())


def table_bytes(module: nn.Module, name: str, bits: int) -> int:
    """Bytes of a quantized embedding table of a float model."""
    return _table_entry(module, name, bits).bytes


def _header_bound(shapes: Mapping[str, Sequence[int]], entries: Sequence[LayerEntry]) -> int:
    """Upper bound in bytes of the header of ``model.safetensors``: longest dtype, largest offsets, and padding."""
    tensors = {
        name: {"dtype": LONGEST_DTYPE, "shape": shape, "data_offsets": [MOST, MOST]} for name, shape in shapes.items()
    }
    layers = {entry.layer: entry.summary() for entry in entries}
    any_digest = digest(b"")
    return len(header_text(tensors, metadata(tensors, layers, [any_digest] * len(tensors), any_digest))) + ALIGNED


def _longest(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description, with missing values replaced by the longest ones."""
    budget = {"asked": "x" * 32, "budget_bytes": MOST, "accounting": "exact"} | (description.get("budget") or {})
    hashes = dict.fromkeys(HASH_KEYS, "x" * 64) | (description.get("hashes") or {})
    return {**description, "budget": budget, "hashes": hashes}


def _described_bytes(entry: LayerEntry) -> int:
    """Approximate bytes of a layer's description: its entry, and its tensors in the header."""
    rows = [entry.to_json(), {entry.layer: entry.summary()}]
    return len(compact(rows).encode()) + sum(len(name) + 120 for name in entry.layout())


def _unpaid(entry: LayerEntry) -> int:
    """Most bytes of a layer that ``paper`` accounting omits, over all forms and ranks up to ``min(m, n)``."""
    shape = Shape(*entry.matrix_shape)
    most = 0
    for form in FORMS:
        if form.serves(shape):
            largest = form.largest(shape)
            if largest.rank is not None:
                largest = replace(largest, rank=min(entry.matrix_shape))
            matrices = form.matrices(largest, shape, entry.zero_point).values()
            most = max(most, sum(codec.unpaid(rows, columns) for rows, columns, codec in matrices))
    return most


def float_rest(
    module: nn.Module, layers: Mapping[str, Sequence[str]], tables: Collection[str] = ()
) -> dict[str, TensorSize]:
    """Sizes of the tensors of a float model that a checkpoint stores unchanged, by state-dict name.

    Args:
        module: the float model.
        layers: the names of the compressible layers, each with its aliases.
        tables: names of the embedding tables that are quantized.
    """
    rest, _ = stored_once(_float_state(module, shared_names(module, layers, layers), tables))
    return {name: TensorSize(tuple(tensor.shape), tensor.nbytes) for name, tensor in rest.items()}


def _float_state(module: nn.Module, names: Mapping[str, Sequence[str]], tables: Collection[str]) -> dict[str, Tensor]:
    replaced = {f"{path}.weight" for paths in names.values() for path in paths}
    replaced |= {f"{name}.weight" for name in tables}
    return {name: tensor for name, tensor in tensor_state(module).items() if name not in replaced}
