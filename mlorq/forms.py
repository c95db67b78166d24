"""What a layer can become: the two forms of the published method, as records.

``Q(b)`` keeps codes of W; ``LR(r, bA, bB)`` keeps codes of two factors, ``W ≈ A B`` (METHOD 1). A form is named by the
matrices it stores, so a further form (``Q + A B``) is a further combination of the same parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlorq.quantizers import QuantizedMatrix, ZeroPoint, store_matrix

__all__ = ["Candidate", "CompressedLayer", "Form", "QuantizedMatrix", "ZeroPoint", "store_matrix"]

Form = Literal["Q", "LR"]


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer.

    Attributes:
        form: ``Q`` or ``LR``.
        bits: code width of W (``Q``), else None.
        bits_a: code width of the left factor A, ``(out_features, rank)`` (``LR``), else None.
        bits_b: code width of the right factor B, ``(rank, in_features)`` (``LR``), else None.
        rank: columns of A and rows of B (``LR``), else None.
    """

    form: Form
    bits: int | None = None
    bits_a: int | None = None
    bits_b: int | None = None
    rank: int | None = None

    @property
    def candidate_id(self) -> str:
        """``Q4`` or ``LR64-8-4`` (rank, bits of A, bits of B)."""
        return f"Q{self.bits}" if self.form == "Q" else f"LR{self.rank}-{self.bits_a}-{self.bits_b}"


@dataclass(frozen=True)
class CompressedLayer:
    """One layer's stored matrices.

    Attributes:
        layer: the layer's name in the model.
        candidate: which form, bits and rank it has.
        matrices: ``{"weight": W}`` for ``Q``, ``{"a": A, "b": B}`` for ``LR``.
    """

    layer: str
    candidate: Candidate
    matrices: dict[str, QuantizedMatrix]

    def dense(self) -> Tensor:
        """The layer's weight ``(out_features, in_features)`` float32 as the compressed layer computes with it."""
        if self.candidate.form == "Q":
            return self.matrices["weight"].dequantize()
        return self.matrices["a"].dequantize() @ self.matrices["b"].dequantize()

    def tensors(self) -> dict[str, Tensor]:
        """Unpacked tensors by name (``weight.codes``, ``a.scale`` …), the content of a ``rounded`` artifact."""
        return {
            f"{name}.{part}": getattr(matrix, part)
            for name, matrix in self.matrices.items()
            for part in ("codes", "scale", "zero_point")
        }

    @classmethod
    def from_tensors(cls, layer: str, candidate: Candidate, tensors: dict[str, Tensor]) -> CompressedLayer:
        """The inverse of ``tensors``."""
        bits = {"weight": candidate.bits, "a": candidate.bits_a, "b": candidate.bits_b}
        names = ["weight"] if candidate.form == "Q" else ["a", "b"]
        matrices = {
            name: QuantizedMatrix(
                codes=tensors[f"{name}.codes"].to(torch.uint8),
                scale=tensors[f"{name}.scale"],
                zero_point=tensors[f"{name}.zero_point"],
                bits=bits[name] or 0,
            )
            for name in names
        }
        return cls(layer, candidate, matrices)
