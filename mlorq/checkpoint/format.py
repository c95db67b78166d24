"""What a compressed model is on disk: the bytes of ``model.safetensors`` and ``config.json``, and their sizes.

The tensors are the state dict of the compressed module: packed codes, scales and zero-points of the
compressed layers, and everything else in its own dtype, each shared tensor once. ``config.json`` says how the
float architecture is rebuilt and which of its layers are replaced. Both files are functions of the model
alone: no date, no machine, no pickle. What the folder weighs is known to the byte:

    sizes.bytes (compressed layers' tensors) + sizes.rest_bytes (all other tensors) + sizes.overhead_bytes

and sizes.embedding_bytes where embedding tables are quantized;

where the overhead is the header of ``model.safetensors`` and the whole of ``config.json``. The last two are
bounded by ``rest_upper_bound`` before any layer is compressed, so that the size of a whole checkpoint can be
a budget (METHOD 2).
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.artifacts.store import json_bytes, tensors_bytes
from mlorq.checkpoint.entry import LayerEntry, dtype_name
from mlorq.checkpoint.float_sizes import TensorSize
from mlorq.codecs.base import FLOAT_BYTES, Accounting, Storage
from mlorq.errors import CheckpointError
from mlorq.forms.base import FORMS, Shape, uniform_candidate
from mlorq.forms.modules import CompressedModule, compressed_class, get_layer, shared_names

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
CONFIG = "config.json"
EMBEDDING = "embedding"  # kind of an entry that is a table and no layer of the search
DESCRIPTION_KEYS = {"architecture", "dtype", "budget", "hashes", "activations", "extra"}
BUDGET_KEYS = ("asked", "budget_bytes", "accounting")
HASH_KEYS = ("model", "calibration", "configuration")
MOST = 10**15  # as long as any number of bytes


def checkpoint_files(module: nn.Module, description: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of a compressed model; equal models and descriptions give equal bytes.

    Args:
        module: the model with its layers replaced (``mlorq.forms.modules.replace_layers``).
        description: JSON values. ``architecture`` (``{"family": …}`` and what that family rebuilds from) is
            needed; ``dtype`` (default: that of the first floating parameter), ``budget`` (``asked``,
            ``budget_bytes``, ``accounting``), ``hashes`` (``model``, ``calibration``, ``configuration``),
            ``activations`` (``ActivationPlan.to_json``, of the quantizers that the module has) and ``extra``
            (anything) may be left out.

    Raises:
        CheckpointError: the description is not JSON or has other keys; a part of the state is no tensor.
    """
    entries, weights = _compressed_entries(module)
    taken = {name for entry in entries for path in (entry.layer, *entry.aliases) for name in entry.tensor_names(path)}
    state = tensor_state(module)
    rest, aliases = _stored_once({name: tensor for name, tensor in state.items() if name not in taken})
    data = tensors_bytes(_unshared({**weights, **rest}))
    sizes = sizes_of(entries, sum(tensor.nbytes for tensor in rest.values()), 0)
    header = len(data) - sizes["bytes"] - sizes.get("embedding_bytes", 0) - sizes["rest_bytes"]
    while True:  # config.json counts itself, and grows with the count by a digit at most
        config = _config_bytes(module, entries, aliases, sizes, description)
        if sizes["overhead_bytes"] == header + len(config):
            return {TENSORS: data, CONFIG: config}
        sizes["overhead_bytes"] = header + len(config)


def rest_upper_bound(
    module: nn.Module,
    layers: Mapping[str, Sequence[str]],
    description: Mapping[str, Any],
    *,
    accounting: Accounting = "exact",
    tables: Mapping[str, int] | None = None,
    extra_bytes: int = 4096,
) -> int:
    """Most bytes that a checkpoint holds beside its compressible layers' weights, whatever these become.

    For every allocation ``folder <= rest_upper_bound(…) + Σ candidate_bytes(…, accounting, …)``. It is the
    sum of the tensors that stay float and of the headers in the case that each layer takes the form with the longest
    description, with all numbers as long as they can be: some hundred bytes per layer too much.

    Args:
        module: the float model, in the dtype in which it will be saved.
        layers: the names of the compressible layers, each with its aliases.
        description: as for ``checkpoint_files``, as far as it is known.
        accounting: how candidates will be counted; with ``paper`` this bound has to hold the scales,
            zero-points and padding that the count leaves out.
        tables: bits of the embedding tables that will be quantized, by name; they are part of this bound.
        extra_bytes: room for what the final description adds, beside the keys of budget and hashes.

    Raises:
        ModelError: a layer is not in the model.
        CheckpointError: as for ``checkpoint_files``.
    """
    names = shared_names(module, layers, layers)
    state = _float_state(module, names, tables or {})
    rest, aliases = _stored_once(state)
    for name, stored in aliases.items():
        # Only one and the same parameter stays shared when a module is moved.
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
    header = _header_bound(shapes)
    config = _config_bytes(
        module, entries, aliases, dict.fromkeys(sizes_of(entries, 0, 0), MOST), _longest(description)
    )
    return sum(tensor.nbytes for tensor in rest.values()) + unpaid + header + len(config) + extra_bytes


def _longest_entry(module: nn.Module, name: str, further: Sequence[str]) -> LayerEntry:
    """The longest description that a layer may get, whatever form it takes."""
    layer = get_layer(module, name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kind, dtype = compressed_class(layer, name).kind, dtype_name(weight.dtype)
    shape = Shape(weight.shape[0], weight[0].numel())
    entries = [
        LayerEntry(name, kind, tuple(weight.shape), form.largest(shape), "int16", dtype, MOST, tuple(further))
        for form in FORMS
        if form.serves(shape)
    ]
    return max(entries, key=_described_bytes)


def _table_entry(module: nn.Module, name: str, bits: int) -> LayerEntry:
    """The description of an embedding table."""
    weight = get_layer(module, name).weight
    assert isinstance(weight, Tensor)
    candidate = uniform_candidate(bits)
    size = FORMS[candidate.form].size(candidate, Shape(weight.shape[0], weight.shape[1]), Storage())
    return LayerEntry(name, EMBEDDING, tuple(weight.shape), candidate, "codes", dtype_name(weight.dtype), size, ())


def _header_bound(shapes: Mapping[str, Sequence[int]]) -> int:
    """Most bytes of the header of ``model.safetensors``: longest dtype, largest offsets, length and alignment."""
    tensors = {
        name: {"dtype": "F8_E5M2FNUZ", "shape": shape, "data_offsets": [MOST, MOST]} for name, shape in shapes.items()
    }
    return len(json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode()) + 8 + 7


def _longest(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description with everything that is not known yet as long as it can be."""
    budget = {"asked": "x" * 32, "budget_bytes": MOST, "accounting": "exact"} | (description.get("budget") or {})
    hashes = dict.fromkeys(HASH_KEYS, "x" * 64) | (description.get("hashes") or {})
    return {**description, "budget": budget, "hashes": hashes}


def _described_bytes(entry: LayerEntry) -> int:
    """How much a layer's description takes: its entry, and its tensors in the header."""
    return len(json.dumps(entry.to_json())) + sum(len(name) + 100 for name in entry.tensor_names(entry.layer))


def _unpaid(entry: LayerEntry) -> int:
    """Most bytes of a layer in any form that ``paper`` does not count; ranks end at ``min(m, n)``."""
    shape = Shape(*entry.matrix_shape)
    most = 0
    for form in FORMS:
        if form.serves(shape):
            largest = form.largest(shape)
            if largest.rank is not None:
                largest = replace(largest, rank=min(entry.matrix_shape))
            matrices = form.matrices(largest, shape).values()
            most = max(most, sum(codec.unpaid(rows, columns) for rows, columns, codec in matrices))
    return most


def float_rest(
    module: nn.Module, layers: Mapping[str, Sequence[str]], tables: Collection[str] = ()
) -> dict[str, TensorSize]:
    """The tensors that stay as they are in a checkpoint of a float model.

    Args:
        module: the float model.
        layers: the names of the compressible layers, each with its aliases.
        tables: embedding tables that are quantized.
    """
    rest, _ = _stored_once(_float_state(module, shared_names(module, layers, layers), tables))
    return {name: TensorSize(tuple(tensor.shape), tensor.nbytes) for name, tensor in rest.items()}


def _float_state(module: nn.Module, names: Mapping[str, Sequence[str]], tables: Collection[str]) -> dict[str, Tensor]:
    replaced = {f"{path}.weight" for paths in names.values() for path in paths}
    replaced |= {f"{name}.weight" for name in tables}
    return {name: tensor for name, tensor in tensor_state(module).items() if name not in replaced}


def _config_bytes(
    module: nn.Module,
    entries: Sequence[LayerEntry],
    aliases: Mapping[str, str],
    sizes: Mapping[str, int],
    description: Mapping[str, Any],
) -> bytes:
    given = _canonical(description)
    unknown = set(given) - DESCRIPTION_KEYS
    if unknown or not isinstance(given.get("architecture"), dict):
        raise CheckpointError(
            f"description: needs architecture and may have {sorted(DESCRIPTION_KEYS)}, not {sorted(given)}"
        )
    persistent = set(module.state_dict(keep_vars=True))
    buffers = {
        name: dtype_name(buffer.dtype)
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if name not in persistent and buffer.is_floating_point()
    }
    return json_bytes(
        {
            "format_version": FORMAT_VERSION,
            "mlorq_version": _mlorq_version(),
            "architecture": given["architecture"],
            "dtype": given.get("dtype") or _module_dtype(module),
            "layers": [entry.to_json() for entry in entries],
            "budget": dict.fromkeys(BUDGET_KEYS) | (given.get("budget") or {}),
            "sizes": dict(sizes),
            "hashes": dict.fromkeys(HASH_KEYS) | (given.get("hashes") or {}),
            "aliases": dict(aliases),
            "buffers": buffers,
            "extra": given.get("extra") or {},
            **({"activations": given["activations"]} if given.get("activations") else {}),
        }
    )


def sizes_of(entries: Sequence[LayerEntry], rest_bytes: int, overhead_bytes: int) -> dict[str, int]:
    """``config.json``'s ``sizes``; ``embedding_bytes`` is there where embedding tables are quantized."""
    layers = [entry for entry in entries if entry.kind != EMBEDDING]
    stored = sum(entry.bytes for entry in layers)
    tables = {} if len(layers) == len(entries) else {"embedding_bytes": sum(entry.bytes for entry in entries) - stored}
    return {
        "bytes": stored,
        **tables,
        "rest_bytes": rest_bytes,
        "overhead_bytes": overhead_bytes,
        "float_bytes": FLOAT_BYTES * sum(torch.Size(entry.shape).numel() for entry in layers),
    }


def _compressed_entries(module: nn.Module) -> tuple[list[LayerEntry], dict[str, Tensor]]:
    """The compressed layers of a module in its own order, and their tensors by name."""
    found: dict[str, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, CompressedModule):
            found.setdefault(child.layer_name, []).append(path)
    entries: list[LayerEntry] = []
    weights: dict[str, Tensor] = {}
    for name, paths in found.items():
        # A module that is saved as a part of another, or wrapped, has other paths than its layers remember.
        first = name if name in paths else paths[0]
        layer = get_layer(module, first)
        assert isinstance(layer, CompressedModule)
        stored = layer.stored_tensors()
        others = [path for path in paths if path != first]
        for path in others:
            twin = get_layer(module, path)
            assert isinstance(twin, CompressedModule)
            if not all(torch.equal(tensor, twin.stored_tensors()[part]) for part, tensor in stored.items()):
                raise CheckpointError(f"layers {first!r} and {path!r} both say they are {name!r} but differ")
        entries.append(
            LayerEntry(
                layer=first,
                kind=layer.kind,
                shape=layer.weight_shape,
                candidate=layer.candidate,
                zero_point=layer.zero_point,
                dtype=dtype_name(layer.compute_dtype),
                bytes=layer.stored_bytes,
                aliases=tuple(others),
            )
        )
        weights |= {f"{first}.{part}": tensor for part, tensor in stored.items()}
    return entries, weights


def tensor_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, which must be tensors alone.

    Raises:
        CheckpointError: a part of it is none.
    """
    state = module.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"state {name!r} is a {type(value).__name__}; only tensors can be stored")
    return state


def _stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the first of their names, and ``{further name: first name}`` of those that are one in memory."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        stored = first.setdefault(place, name)
        if stored != name:
            aliases[name] = stored
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where they are views of a larger or common memory (safetensors refuses it)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        result[name] = tensor.detach().clone() if shared else tensor
    return result


def _canonical(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description as JSON reads it back, keys in one order whatever order they were given in."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(description, sort_keys=True, allow_nan=False))
        return found
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"description: {error}") from error


def _module_dtype(module: nn.Module) -> str:
    computing = [child.compute_dtype for child in module.modules() if isinstance(child, CompressedModule)]
    floating = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    return dtype_name((floating or computing or [torch.float32])[0])


def _mlorq_version() -> str:
    try:
        return importlib.metadata.version("mlorq")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
