"""One layer's stored matrices, as rounding returns, artifacts keep, and checkpoints pack them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mlorq.codecs.base import FittedMatrix, StoredMatrix
from mlorq.forms.base import FORMS, Candidate


@dataclass(frozen=True)
class CompressedLayer:
    """One layer's stored matrices.

    Attributes:
        layer: the layer's name in the model.
        candidate: its form, bits and rank.
        matrices: the stored matrices, by name (``Form.names``).
        bias: ``(out_features,)`` float32, replaces the float layer's bias; None: that one is kept.
    """

    layer: str
    candidate: Candidate
    matrices: dict[str, StoredMatrix]
    bias: Tensor | None = None

    @classmethod
    def of_rounded(cls, layer: str, candidate: Candidate, parts: Mapping[str, FittedMatrix]) -> CompressedLayer:
        """The record of rounded matrices, on the CPU."""
        return cls(layer, candidate, {name: part.store() for name, part in parts.items()})

    def dense(self) -> Tensor:
        """The layer's weight ``(out_features, in_features)`` float32 that the compressed layer computes with."""
        values = {name: matrix.dequantize() for name, matrix in self.matrices.items()}
        return FORMS[self.candidate.form].combine(values)

    def tensors(self) -> dict[str, Tensor]:
        """Unpacked tensors by name (``weight.codes``, ``a.scale`` …, ``bias``): content of a ``rounded`` artifact."""
        found = {
            f"{name}.{part}": tensor
            for name, matrix in self.matrices.items()
            for part, tensor in matrix.tensors().items()
        }
        return found if self.bias is None else found | {"bias": self.bias.detach().float().cpu()}

    @classmethod
    def from_tensors(cls, layer: str, candidate: Candidate, tensors: Mapping[str, Tensor]) -> CompressedLayer:
        """The inverse of ``tensors``."""
        matrices = {}
        for name, codec in FORMS[candidate.form].codecs(candidate, "codes").items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            matrices[name] = codec.from_tensors(own)
        return cls(layer, candidate, matrices, tensors.get("bias"))
