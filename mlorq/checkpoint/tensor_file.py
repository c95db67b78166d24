"""``model.safetensors``: its header, which identifies its content, and reading of tensors with their digests.

The file is a safetensors file like any other. Entry ``mlorq`` of its metadata is a JSON text with

    format_version   2
    layers           {layer: [candidate, shape of the float weight]}
    digests          of the tensors' bytes, in the order of the data, separated by spaces
    description      digest of mlorq.json
    check            digest of this object without ``check`` and of the table of tensors, as canonical JSON

A digest is the first 16 hex digits of a SHA-256, so that every flipped bit in either file is noticed. Files of format 1
have no such entry. Tensors are read one by one, each byte once, into memory of their own: the bytes that are digested
are those that the model computes with, nothing is resident twice, and a file that is replaced later changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

from mlorq.checkpoint.places import TENSORS, reading
from mlorq.errors import CheckpointError, one_line
from mlorq.numbers import byte_count

FORMAT_VERSION = 2
ENTRY = "mlorq"  # key of the file's metadata
DIGEST_DIGITS = 16
MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
LENGTH_BYTES, ALIGNED = 8, 8
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file: its dtype and shape, and its bytes ``begin`` to ``end`` of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    digest: str | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The header of the file.

    Attributes:
        tensors: by name, in the order of the data.
        start: offset of the data in the file.
        description: digest of ``mlorq.json``; None in format 1.
        layers: candidate and shape of each compressed layer; empty in format 1.
    """

    tensors: Mapping[str, StoredTensor]
    start: int
    description: str | None = None
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)


def digest(data: bytes | memoryview) -> str:
    """The digest of bytes: the first 16 hex digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]


def header_text(table: Mapping[str, Any], own: Mapping[str, Any]) -> bytes:
    """The bytes before the data: length, table of tensors and metadata, padded."""
    whole = {"__metadata__": {ENTRY: compact(own)}, **table}
    text = compact(whole).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parts(data: bytes) -> tuple[dict[str, Any], memoryview, list[str]]:
    """The table of a safetensors file without metadata, its data, and the digests of its tensors in their order."""
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    table, body = json.loads(data[LENGTH_BYTES:start]), memoryview(data)[start:]
    spans = sorted(value["data_offsets"] for value in table.values())
    return table, body, [digest(body[begin:end]) for begin, end in spans]


def metadata(
    table: Mapping[str, Any], layers: Mapping[str, Any], digests: Sequence[str], description: str
) -> dict[str, Any]:
    """The entry ``mlorq`` of the header.

    Args:
        table: dtype, shape and offsets of each tensor, as in the header.
        layers: candidate and shape of each compressed layer.
        digests: of the tensors, in the order of the data.
        description: digest of ``mlorq.json``; any text of its length gives a header of the same size.
    """
    own = {
        "format_version": FORMAT_VERSION,
        "layers": dict(layers),
        "digests": " ".join(digests),
        "description": description,
    }
    return own | {"check": _check(table, own)}


def read_header(file: IO[bytes], file_bytes: int) -> Header:
    """The header of a file, compared with its size: nothing is allocated that the file does not hold.

    Args:
        file: positioned at its start.
        file_bytes: size of the file.

    Raises:
        CheckpointError: the header is damaged or cannot be read, or the file has another size than it says.
    """
    try:
        start = LENGTH_BYTES + int.from_bytes(_read(file, LENGTH_BYTES), "little")
        if not 2 * LENGTH_BYTES <= start + LENGTH_BYTES <= min(file_bytes, MOST_HEADER) + LENGTH_BYTES:
            raise ValueError(f"a header of {byte_count(start - LENGTH_BYTES)} in a file of {byte_count(file_bytes)}")
        table = json.loads(_read(file, start - LENGTH_BYTES))
        if not isinstance(table, dict):
            raise ValueError("the header is not an object")
        extra = table.pop("__metadata__", None) or {}
        tensors = _tensors(table)
        ends = [0, *(tensor.end for tensor in tensors.values())]
        for (name, tensor), before in zip(tensors.items(), ends, strict=False):
            if tensor.begin != before:
                raise ValueError(f"tensor {name!r} does not follow the one before it")
        if start + ends[-1] != file_bytes:
            raise ValueError(f"it has {byte_count(file_bytes)} instead of {byte_count(start + ends[-1])}")
        own = json.loads(extra[ENTRY]) if ENTRY in extra else None
        if own is None:
            return Header(tensors, start)
        return _with_digests(table, tensors, own, start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(f"{TENSORS} is damaged: {reason}") from error


def read_tensor(file: IO[bytes], header: Header, name: str) -> Tensor:
    """One tensor, in memory of its own.

    Args:
        file: the file, which can seek.
        header: its header.
        name: of the tensor.

    Raises:
        CheckpointError: the bytes do not have the tensor's digest, or cannot be read.
    """
    stored = header.tensors[name]
    found = torch.empty(stored.shape, dtype=stored.dtype)
    # As bytes, since NumPy has no bfloat16; a scalar has no axis to be viewed along.
    view = found.reshape(-1).view(torch.uint8).numpy().data if stored.bytes else memoryview(b"")
    with reading(TENSORS):
        file.seek(header.start + stored.begin)
        read = file.readinto(view) if stored.bytes else 0  # type: ignore[attr-defined]
    if read != stored.bytes:
        raise CheckpointError(f"{TENSORS} is damaged: tensor {name!r} is cut off")
    if stored.digest is not None and digest(view) != stored.digest:
        raise CheckpointError(f"{TENSORS} is damaged: tensor {name!r} does not have its digest")
    return found


def _read(file: IO[bytes], size: int) -> bytes:
    with reading(TENSORS):
        return file.read(size)


def _tensors(table: Mapping[str, Any]) -> dict[str, StoredTensor]:
    found = {}
    for name, value in table.items():
        if not isinstance(value, dict) or value.get("dtype") not in DTYPES:
            raise ValueError(f"tensor {name!r} has an unknown dtype")
        dtype, shape, span = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
        if len(span) != 2 or any(type(number) is not int or number < 0 for number in (*shape, *span)):
            raise ValueError(f"tensor {name!r} has a malformed shape or offset")
        size = dtype.itemsize
        for length in shape:  # integers of any size: no product overflows
            size *= length
        if span[1] - span[0] != size:
            given = f"{byte_count(span[1] - span[0])} instead of {byte_count(size)}"
            raise ValueError(f"tensor {name!r} of shape {tuple(shape)} has {given}")
        found[name] = StoredTensor(dtype, tuple(shape), *span)
    return dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))


def _with_digests(table: Mapping[str, Any], tensors: Mapping[str, StoredTensor], own: Any, start: int) -> Header:
    if own["format_version"] != FORMAT_VERSION:
        raise ValueError(f"it has format version {own['format_version']!r}, not {FORMAT_VERSION}")
    if own.pop("check") != _check(table, own):
        raise ValueError("its header does not have its digest")
    digests = own["digests"].split()
    if len(digests) != len(tensors):
        raise ValueError("a digest is missing")
    pairs = zip(tensors.items(), digests, strict=True)
    with_digests = {name: StoredTensor(t.dtype, t.shape, t.begin, t.end, found) for (name, t), found in pairs}
    return Header(with_digests, start, own["description"], own["layers"])


def _check(table: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    return digest(json.dumps([own, table], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def compact(value: Any) -> str:
    """A value as JSON text without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
