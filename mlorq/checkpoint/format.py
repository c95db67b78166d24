"""The checkpoint format: the bytes of ``model.safetensors`` and ``config.json``, and their sizes.

The tensors are the state dict of the compressed module: packed codes, scales and zero-points of the compressed layers,
and all other tensors in their own dtypes; shared tensors are stored once. ``config.json`` describes how to rebuild the
float architecture and which of its layers to replace. Both files depend on the model alone: they contain no date, no
machine name and no pickle. The size of the folder in bytes is exactly

    sizes.bytes (compressed layers) + sizes.rest_bytes (all other tensors) + sizes.overhead_bytes

plus ``sizes.embedding_bytes`` if embedding tables are quantized. The overhead is the header of ``model.safetensors``
and all of ``config.json``. ``rest_upper_bound`` bounds all but ``sizes.bytes`` before any layer is compressed, so that
a budget can limit the size of the whole checkpoint (METHOD 2).
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
EMBEDDING = "embedding"  # kind of entry of embedding tables, which are not layers of the search
DESCRIPTION_KEYS = {"architecture", "dtype", "budget", "hashes", "activations", "extra"}
BUDGET_KEYS = ("asked", "budget_bytes", "accounting")
HASH_KEYS = ("model", "calibration", "configuration")
MOST = 10**15  # has at least as many digits as any number of bytes


def checkpoint_files(module: nn.Module, description: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of a compressed model's two files, by name; equal models and descriptions give equal bytes.

    Args:
        module: the model with its layers replaced (``mlorq.forms.modules.replace_layers``).
        description: JSON values. ``architecture`` (``{"family": …}`` and the values from which that family rebuilds
            it) is required. Optional are ``dtype`` (default: that of the first floating parameter), ``budget``
            (``asked``, ``budget_bytes``, ``accounting``), ``hashes`` (``model``, ``calibration``, ``configuration``),
            ``activations`` (``ActivationPlan.to_json`` of the module's quantizers) and ``extra`` (anything).

    Raises:
        CheckpointError: the description is not JSON or has other keys, a part of the state is not a tensor, or two
            layers of one name differ.
    """
    entries, weights = _compressed_entries(module)
    taken = {name for entry in entries for path in (entry.layer, *entry.aliases) for name in entry.tensor_names(path)}
    state = tensor_state(module)
    rest, aliases = _stored_once({name: tensor for name, tensor in state.items() if name not in taken})
    data = tensors_bytes(_unshared({**weights, **rest}))
    sizes = sizes_of(entries, sum(tensor.nbytes for tensor in rest.values()), 0)
    header = len(data) - sizes["bytes"] - sizes.get("embedding_bytes", 0) - sizes["rest_bytes"]
    while True:  # config.json contains its own size; iterate until the number of digits is stable
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
    rest, aliases = _stored_once(state)
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
    header = _header_bound(shapes)
    config = _config_bytes(
        module, entries, aliases, dict.fromkeys(sizes_of(entries, 0, 0), MOST), _longest(description)
    )
    return sum(tensor.nbytes for tensor in rest.values()) + unpaid + header + len(config) + extra_bytes


def _longest_entry(module: nn.Module, name: str, further: Sequence[str]) -> LayerEntry:
    """The entry with the longest description, over all forms that suit the layer."""
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
    """The entry of a quantized embedding table."""
    weight = get_layer(module, name).weight
    assert isinstance(weight, Tensor)
    candidate = uniform_candidate(bits)
    size = FORMS[candidate.form].size(candidate, Shape(weight.shape[0], weight.shape[1]), Storage())
    return LayerEntry(name, EMBEDDING, tuple(weight.shape), candidate, "codes", dtype_name(weight.dtype), size, ())


def _header_bound(shapes: Mapping[str, Sequence[int]]) -> int:
    """Upper bound in bytes of the header of ``model.safetensors``: longest dtype, largest offsets, length, padding."""
    tensors = {
        name: {"dtype": "F8_E5M2FNUZ", "shape": shape, "data_offsets": [MOST, MOST]} for name, shape in shapes.items()
    }
    return len(json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode()) + 8 + 7


def _longest(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description, with missing values replaced by the longest ones."""
    budget = {"asked": "x" * 32, "budget_bytes": MOST, "accounting": "exact"} | (description.get("budget") or {})
    hashes = dict.fromkeys(HASH_KEYS, "x" * 64) | (description.get("hashes") or {})
    return {**description, "budget": budget, "hashes": hashes}


def _described_bytes(entry: LayerEntry) -> int:
    """Approximate bytes of a layer's description: its entry, and its tensors in the header."""
    return len(json.dumps(entry.to_json())) + sum(len(name) + 100 for name in entry.tensor_names(entry.layer))


def _unpaid(entry: LayerEntry) -> int:
    """Most bytes of a layer that ``paper`` accounting omits, over all forms and ranks up to ``min(m, n)``."""
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
    """Sizes of the tensors of a float model that a checkpoint stores unchanged, by state-dict name.

    Args:
        module: the float model.
        layers: the names of the compressible layers, each with its aliases.
        tables: names of the embedding tables that are quantized.
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
            f"description: has keys {sorted(given)}; give architecture (an object) and only {sorted(DESCRIPTION_KEYS)}"
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
    """The object ``sizes`` of ``config.json``; it has ``embedding_bytes`` if embedding tables are quantized."""
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
    """Entries of a module's compressed layers, in the module's order, and their tensors by name."""
    found: dict[str, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, CompressedModule):
            found.setdefault(child.layer_name, []).append(path)
    entries: list[LayerEntry] = []
    weights: dict[str, Tensor] = {}
    for name, paths in found.items():
        # In a wrapped module, or a part of one, paths differ from the names that the layers store.
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
    """The state dict of a module, with parameters and buffers themselves as values.

    Raises:
        CheckpointError: a value is not a tensor.
    """
    state = module.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"state {name!r} is a {type(value).__name__}; only tensors can be stored")
    return state


def _stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their first names, and ``{other name: first name}`` of tensors that share memory."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        stored = first.setdefault(place, name)
        if stored != name:
            aliases[name] = stored
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied if they share or only partly cover their storage (safetensors refuses such tensors)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        result[name] = tensor.detach().clone() if shared else tensor
    return result


def _canonical(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description after a JSON round-trip, with sorted keys."""
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
