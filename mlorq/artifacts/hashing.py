"""Content hashes: the keys of artifacts.

Every key is a BLAKE2b digest of canonical JSON or of raw bytes, so it is the same in every process, on every machine
and with every Prefect database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

DIGEST_BYTES = 16


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """Hex BLAKE2b-128 digest of raw bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def digest_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of the order of keys; floats are written in their shortest exact form.

    Raises:
        TypeError: the value contains an object that JSON cannot represent.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return digest_bytes(text.encode())


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest of named tensors: names, dtypes, shapes and bytes, in the order given."""
    import torch

    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        state.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
        # Viewed as bytes because NumPy has no bfloat16.
        state.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest_model(module: nn.Module, architecture: Any) -> str:
    """Key of a float model: hex digest of its architecture and of all parameters and buffers."""
    weights = digest_tensors(sorted(module.state_dict().items()))
    return digest_json({"architecture": architecture, "weights": weights})


def digest_batch(batch: Any) -> str:
    """Hex digest of one model input: a tensor, or nested tuples, lists and mappings of tensors and plain values."""
    import numpy as np
    import torch

    if isinstance(batch, torch.Tensor):
        return digest_tensors([("", batch)])
    if isinstance(batch, np.ndarray):
        return digest_tensors([("", torch.from_numpy(batch))])
    if isinstance(batch, Mapping):
        return digest_json({str(name): digest_batch(value) for name, value in batch.items()})
    if isinstance(batch, (list, tuple)):
        return digest_json([digest_batch(value) for value in batch])
    return digest_json(batch if isinstance(batch, (str, int, float, bool, type(None))) else repr(batch))
