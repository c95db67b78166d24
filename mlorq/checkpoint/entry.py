"""Entries of compressed layers in a checkpoint's ``mlorq.json``, and the tensors that belong to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mlorq.codecs.affine import ZERO_POINT_DTYPES
from mlorq.codecs.base import TensorSpec, ZeroPoint
from mlorq.forms.base import FIELDS, FORMS, Candidate, MatrixSpec, Shape
from mlorq.models.kinds import BY_NAME, TABLE

EMBEDDING = TABLE.name  # kind of embedding tables, which are not layers of the search
INTEGERS = ("bits", "bits_a", "bits_b", "rank", "bytes")


@dataclass(frozen=True)
class LayerEntry:
    """One compressed layer in ``mlorq.json``.

    Attributes:
        layer: name in the model.
        kind: name of the layer's kind (``mlorq.models.kinds``), or ``embedding``.
        shape: of the float weight.
        candidate: form, bit-widths and rank.
        zero_point: storage of zero-points.
        dtype: dtype in which the layer computes.
        bytes: size of its tensors in ``model.safetensors``.
        aliases: other names of the layer, and names of layers with the same weight.
        macs: multiply-accumulates of the float layer per sample, over all its names; None if they are not known, and
            for embedding tables, which are read.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    candidate: Candidate
    zero_point: ZeroPoint
    dtype: str
    bytes: int
    aliases: tuple[str, ...]
    macs: int | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the weight as a matrix."""
        return BY_NAME[self.kind].matrix_shape(self.shape)

    @property
    def weights(self) -> int:
        """Number of entries of the float weight."""
        return math.prod(self.shape)

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weight in the dtype in which the layer computes."""
        return self.weights * dtype_of(self.dtype).itemsize

    @property
    def in_blocks(self) -> bool:
        """Whether a matrix is stored in blocks of columns (``Codec.in_blocks``)."""
        return any(codec.in_blocks(columns) for _, columns, codec in self.matrices().values())

    def tensor_names(self, path: str) -> list[str]:
        """State-dict names of this layer's stored tensors, for one of the layer's names."""
        return [f"{path}.{name.removeprefix(f'{self.layer}.')}" for name in self.layout()]

    def layout(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes of this layer's stored tensors, by state-dict name."""
        return {
            f"{self.layer}.{name}_{part}": spec
            for name, (rows, columns, codec) in self.matrices().items()
            for part, spec in codec.layout(rows, columns).items()
        }

    def summary(self) -> list[Any]:
        """The layer as the header of ``model.safetensors`` has it: its candidate, and the shape of the float weight."""
        return [self.candidate.candidate_id, list(self.shape)]

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dequantized weight, in the float layer's shape and the dtype in which the layer computes.

        Args:
            tensors: the stored tensors by state-dict name.
        """
        form, values = FORMS[self.candidate.form], {}
        for name, (_, columns, codec) in self.matrices().items():
            prefix = f"{self.layer}.{name}_"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            values[name] = codec.unpack(own, columns).dequantize().to(dtype_of(self.dtype))
        return BY_NAME[self.kind].to_weight(form.combine(values), self.shape)

    def to_json(self) -> dict[str, Any]:
        """The row of ``layers`` in ``mlorq.json``; it has ``macs`` if they are known."""
        values = {**asdict(self), **asdict(self.candidate)}
        order = ("layer", "kind", "shape", *FIELDS, "zero_point", "dtype", "bytes", "aliases")
        return {key: values[key] for key in order} | ({} if self.macs is None else {"macs": self.macs})

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> LayerEntry:
        """The entry of a row of ``layers``; ValueError, KeyError or TypeError if a value is missing or invalid."""
        for key in INTEGERS:  # a number such as 2.0 would pass for 2 in most places
            if row[key] is not None and type(row[key]) is not int:
                raise ValueError(f"{key} of layer {row['layer']!r:.60} must be an integer, not {row[key]!r:.60}")
        for key in ("layer", "kind", "form", "zero_point", "dtype"):
            if not isinstance(row[key], str):
                raise ValueError(f"{key} of layer {row['layer']!r:.60} must be a text, not {row[key]!r:.60}")
        if row["kind"] not in BY_NAME:
            raise ValueError(f"layer {row['layer']!r:.60} has the unknown kind {row['kind']!r:.60}")
        macs = row.get("macs")
        if macs is not None and (type(macs) is not int or macs < 0):
            raise ValueError(f"macs of layer {row['layer']!r:.60} must be a non-negative integer, not {macs!r:.60}")
        if not all(type(length) is int for length in row["shape"]) or len(row["shape"]) < 2:
            raise ValueError(f"shape of layer {row['layer']!r} must be a list of integers, not {row['shape']!r:.60}")
        if not all(isinstance(path, str) for path in row["aliases"]):
            raise ValueError(f"aliases of layer {row['layer']!r} must be names, not {row['aliases']!r:.60}")
        candidate = Candidate.of_row(row)
        if candidate.form not in FORMS:
            raise ValueError(f"unknown form {candidate.form!r}; {FORMS.hint(candidate.form)}")
        own = {key: row[key] for key in ("layer", "kind", "zero_point", "dtype", "bytes")}
        entry = cls(candidate=candidate, shape=tuple(row["shape"]), aliases=tuple(row["aliases"]), macs=macs, **own)
        for rows, columns, codec in entry.matrices().values():
            if min(rows, columns, codec.bits) < 1:
                raise ValueError(f"layer {entry.layer!r} has an empty matrix")
        if min(entry.shape) < 1:
            raise ValueError(f"layer {entry.layer!r} has an empty weight")
        if entry.zero_point not in ZERO_POINT_DTYPES or not dtype_of(entry.dtype).is_floating_point:
            raise ValueError(f"layer {entry.layer!r}: invalid zero_point {entry.zero_point!r} or dtype {entry.dtype!r}")
        return entry

    def matrices(self) -> dict[str, MatrixSpec]:
        """Sizes and codecs of the stored matrices, by name."""
        return FORMS[self.candidate.form].matrices(self.candidate, Shape(*self.matrix_shape), self.zero_point)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of ``dtype_name``; ValueError or AttributeError for other names."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype
