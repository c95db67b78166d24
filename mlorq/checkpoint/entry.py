"""One compressed layer's entry in a checkpoint's ``config.json``: what it says, and what it implies for the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mlorq.codecs.affine import ZERO_POINT_DTYPES
from mlorq.codecs.base import ZeroPoint
from mlorq.forms.base import FIELDS, FORMS, Candidate, MatrixSpec, Shape


@dataclass(frozen=True)
class LayerEntry:
    """One compressed layer in ``config.json``.

    Attributes:
        layer: name in the model.
        kind: ``linear`` or ``conv2d``.
        shape: of the float weight.
        candidate: form, bits and rank.
        zero_point: how zero-points are stored.
        dtype: what the layer computes in.
        bytes: of its tensors in ``model.safetensors``.
        aliases: further names of the layer, or of layers with the same weight.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    candidate: Candidate
    zero_point: ZeroPoint
    dtype: str
    bytes: int
    aliases: tuple[str, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the weight as a matrix."""
        return self.shape[0], torch.Size(self.shape[1:]).numel()

    def tensor_names(self, path: str) -> list[str]:
        """Names in the state dict of the stored tensors of this layer, seen at one of its names."""
        return [
            f"{path}.{name}_{part}"
            for name, (rows, columns, codec) in self._matrices().items()
            for part in codec.layout(rows, columns)
        ]

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight in the float layer's shape, in the dtype in which the layer computes.

        Args:
            tensors: the stored tensors by their names in the state dict.
        """
        form, values = FORMS[self.candidate.form], {}
        for name, (_, columns, codec) in self._matrices().items():
            prefix = f"{self.layer}.{name}_"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            values[name] = codec.unpack(own, columns).dequantize().to(dtype_of(self.dtype))
        return form.combine(values).reshape(self.shape)

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), **asdict(self.candidate)}
        order = ("layer", "kind", "shape", *FIELDS, "zero_point", "dtype", "bytes", "aliases")
        return {key: values[key] for key in order}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> LayerEntry:
        """Raises ValueError, KeyError, TypeError, … where a value is missing or cannot be meant."""
        candidate = Candidate.of_row(row)
        if candidate.form not in FORMS:
            raise ValueError(f"unknown form {candidate.form!r}; {FORMS.hint(candidate.form)}")
        own = {key: row[key] for key in ("layer", "kind", "zero_point", "dtype", "bytes")}
        entry = cls(candidate=candidate, shape=tuple(row["shape"]), aliases=tuple(row["aliases"]), **own)
        for rows, columns, codec in entry._matrices().values():
            if min(rows, columns, codec.bits) < 1:
                raise ValueError(f"layer {entry.layer!r} is an empty matrix")
        if entry.zero_point not in ZERO_POINT_DTYPES or not dtype_of(entry.dtype).is_floating_point:
            raise ValueError(f"layer {entry.layer!r}: zero_point {entry.zero_point!r}, dtype {entry.dtype!r}")
        return entry

    def _matrices(self) -> dict[str, MatrixSpec]:
        return FORMS[self.candidate.form].matrices(self.candidate, Shape(*self.matrix_shape), self.zero_point)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of ``dtype_name``; ValueError or AttributeError for names of no dtype."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype
