"""The checkpoint format: the bytes of ``model.safetensors`` and ``mlorq.json``, and their sizes.

The tensors are the state dict of the compressed module: packed codes, scales and zero-points of the compressed layers,
and all other tensors in their own dtypes; shared tensors are stored once. ``mlorq.json`` describes how to rebuild the
float architecture and which of its layers to replace. The header of ``model.safetensors`` identifies its content and
holds the digests of all tensors and of ``mlorq.json`` (``tensor_file``). Both files depend on the model alone: they
contain no date, no machine name and no pickle. The size of the folder in bytes is exactly

    sizes.bytes (compressed layers) + sizes.rest_bytes (all other tensors) + sizes.overhead_bytes

plus ``sizes.embedding_bytes`` if embedding tables are quantized. The overhead is the header of ``model.safetensors``
and all of ``mlorq.json``. Files of a tokenizer or image processor lie in a folder of their own and are not counted
(``preparation``). ``size_bound`` bounds all but ``sizes.bytes`` before any layer is compressed.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.artifacts.store import tensors_bytes
from mlorq.checkpoint.description import ARRANGED, COMPUTED, TRANSPOSED, VERSION_KEY, version_of
from mlorq.checkpoint.entry import EMBEDDING, LayerEntry, dtype_name
from mlorq.checkpoint.places import DESCRIPTION, TENSORS
from mlorq.checkpoint.tensor_file import compact, digest, header_text, metadata, parts
from mlorq.codecs.base import FLOAT_BYTES
from mlorq.errors import CheckpointError
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import get_layer
from mlorq.models.direct_weights import arrangement_of
from mlorq.models.library_layers import computed_by_class
from mlorq.models.transposed import transposed_layers

DESCRIPTION_KEYS = {"architecture", "dtype", "budget", "hashes", "activations", "extra", "preparation"}
BUDGET_KEYS = ("asked", "budget_bytes", "accounting")
HASH_KEYS = ("model", "calibration", "configuration")


def checkpoint_files(
    module: nn.Module, description: Mapping[str, Any], *, macs: Mapping[str, int] | None = None
) -> dict[str, bytes]:
    """The contents of a compressed model's two files, by name; equal models and descriptions give equal bytes.

    Args:
        module: the model with its layers replaced (``mlorq.forms.modules.replace_layers``).
        description: JSON values. ``architecture`` (``{"family": …}`` and the values from which that family rebuilds
            it) is required. Optional are ``dtype`` (default: that of the first floating parameter), ``budget``
            (``asked``, ``budget_bytes``, ``accounting``), ``hashes`` (``model``, ``calibration``, ``configuration``),
            ``activations`` (``ActivationPlan.to_json`` of the module's quantizers), ``extra`` (anything) and
            ``preparation`` (``mlorq.checkpoint.preparation.described`` of files that are stored beside the two).
        macs: multiply-accumulates of the float layers per sample, by name, if they are known.

    Raises:
        CheckpointError: the description is not JSON or has other keys, a part of the state is not a tensor, or two
            layers of one name differ.
    """
    entries, weights = _compressed_entries(module, macs or {})
    taken = {name for entry in entries for path in (entry.layer, *entry.aliases) for name in entry.tensor_names(path)}
    state = tensor_state(module)
    rest, aliases = stored_once({name: tensor for name, tensor in state.items() if name not in taken})
    table, body, digests = parts(tensors_bytes(_unshared({**weights, **rest})))
    summaries = {entry.layer: entry.summary() for entry in entries}
    sizes = sizes_of(entries, sum(tensor.nbytes for tensor in rest.values()), 0)

    def header(text: bytes) -> bytes:
        return header_text(table, metadata(table, summaries, digests, digest(text)))

    while True:  # mlorq.json contains its own size; iterate until the number of digits is stable
        text = description_bytes(module, entries, aliases, sizes, description)
        overhead = len(header(text)) + len(text)
        if sizes["overhead_bytes"] == overhead:
            return {TENSORS: header(text) + body, DESCRIPTION: text}
        sizes["overhead_bytes"] = overhead


def description_bytes(
    module: nn.Module,
    entries: Sequence[LayerEntry],
    aliases: Mapping[str, str],
    sizes: Mapping[str, int],
    description: Mapping[str, Any],
) -> bytes:
    """The bytes of ``mlorq.json``; arguments as its entries, and the description given to ``checkpoint_files``."""
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
    lists = {TRANSPOSED: transposed_layers(module), COMPUTED: computed_by_class(module)}
    extra = (given.get("extra") or {}) | {key: names for key, names in lists.items() if names}
    arranged = arrangement_of(module).to_json()
    extra |= {ARRANGED: arranged} if arranged else {}
    return json_lines(
        {
            VERSION_KEY: version_of(entries, given.get("activations")),
            "mlorq_version": _mlorq_version(),
            "architecture": given["architecture"],
            "dtype": given.get("dtype") or _module_dtype(module),
            "layers": [entry.to_json() for entry in entries],
            "budget": dict.fromkeys(BUDGET_KEYS) | (given.get("budget") or {}),
            "sizes": dict(sizes),
            "hashes": dict.fromkeys(HASH_KEYS) | (given.get("hashes") or {}),
            "aliases": dict(aliases),
            "buffers": buffers,
            "extra": extra,
            **{key: given[key] for key in ("activations", "preparation") if given.get(key)},
        }
    )


def json_lines(values: Mapping[str, Any]) -> bytes:
    """A JSON object with a line for each key, and for each item of a list: short, and a difference shows the layer."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(compact(item) for item in value) + "\n]"
        return compact(value)

    return ("{\n" + ",\n".join(f"{compact(key)}: {text(value)}" for key, value in values.items()) + "\n}\n").encode()


def sizes_of(entries: Sequence[LayerEntry], rest_bytes: int, overhead_bytes: int) -> dict[str, int]:
    """The object ``sizes`` of ``mlorq.json``; it has ``embedding_bytes`` if embedding tables are quantized."""
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


def _compressed_entries(module: nn.Module, macs: Mapping[str, int]) -> tuple[list[LayerEntry], dict[str, Tensor]]:
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
                macs=macs.get(name),
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


def stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
