"""What a layer can become, as records.

``Q(b)`` keeps codes of W; ``LR(r, bA, bB)`` keeps codes of two factors, ``W ≈ A B``; ``QLR(b, r, bA, bB)`` keeps both,
``W ≈ Q_b + A B`` (METHOD 1). A form is named by the matrices it stores: its weight is the sum of their products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlorq.codecs.affine import QuantizedMatrix, ZeroPoint, store_matrix

__all__ = [
    "MATRICES", "Candidate", "CompressedLayer", "Form", "QuantizedMatrix", "ZeroPoint", "combine", "store_matrix",
]  # fmt: skip

Form = Literal["Q", "LR", "QLR"]
MATRICES: dict[Form, tuple[str, ...]] = {"Q": ("weight",), "LR": ("a", "b"), "QLR": ("weight", "a", "b")}


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer.

    Attributes:
        form: ``Q``, ``LR`` or ``QLR``.
        bits: code width of W, or of what A B leaves of it (``Q``, ``QLR``), else None.
        bits_a: code width of the left factor A, ``(out_features, rank)`` (``LR``, ``QLR``), else None.
        bits_b: code width of the right factor B, ``(rank, in_features)`` (``LR``, ``QLR``), else None.
        rank: columns of A and rows of B (``LR``, ``QLR``), else None.
    """

    form: Form
    bits: int | None = None
    bits_a: int | None = None
    bits_b: int | None = None
    rank: int | None = None

    @property
    def candidate_id(self) -> str:
        """``Q4``, ``LR64-8-4`` (rank, bits of A, bits of B), or ``Q3+LR8-4-4``."""
        parts = [] if self.bits is None else [f"Q{self.bits}"]
        parts += [] if self.rank is None else [f"LR{self.rank}-{self.bits_a}-{self.bits_b}"]
        return "+".join(parts)

    @property
    def has_product(self) -> bool:
        """Whether factors are part of it."""
        return self.form != "Q"


@dataclass(frozen=True)
class CompressedLayer:
    """One layer's stored matrices.

    Attributes:
        layer: the layer's name in the model.
        candidate: which form, bits and rank it has.
        matrices: ``{"weight": W}`` for ``Q``, ``{"a": A, "b": B}`` for ``LR``, all three for ``QLR``.
        bias: ``(out_features,)`` float32 in place of the float layer's; None: that one stays.
    """

    layer: str
    candidate: Candidate
    matrices: dict[str, QuantizedMatrix]
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        """The layer's weight ``(out_features, in_features)`` float32 as the compressed layer computes with it."""
        return combine({name: matrix.dequantize() for name, matrix in self.matrices.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Unpacked tensors by name (``weight.codes``, ``a.scale`` …, ``bias``): what a ``rounded`` artifact holds."""
        found = {
            f"{name}.{part}": getattr(matrix, part)
            for name, matrix in self.matrices.items()
            for part in ("codes", "scale", "zero_point")
        }
        return found if self.bias is None else found | {"bias": self.bias.detach().float().cpu()}

    @classmethod
    def from_tensors(cls, layer: str, candidate: Candidate, tensors: dict[str, Tensor]) -> CompressedLayer:
        """The inverse of ``tensors``."""
        bits = {"weight": candidate.bits, "a": candidate.bits_a, "b": candidate.bits_b}
        matrices = {
            name: QuantizedMatrix(
                codes=tensors[f"{name}.codes"].to(torch.uint8),
                scale=tensors[f"{name}.scale"],
                zero_point=tensors[f"{name}.zero_point"],
                bits=bits[name] or 0,
            )
            for name in MATRICES[candidate.form]
        }
        return cls(layer, candidate, matrices, tensors.get("bias"))


def combine(values: Mapping[str, Tensor]) -> Tensor:
    """The weight of a form from the values of its matrices: ``weight``, ``a @ b``, or their sum."""
    if "a" not in values:
        return values["weight"]
    product = values["a"] @ values["b"]
    return values["weight"] + product if "weight" in values else product
