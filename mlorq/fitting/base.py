"""The protocol of a fit: codes of a layer's weight, its factors, their sum, and the local cost of each.

A fit holds what all candidates of one layer share under one metric. ``HessianFit`` implements the paper (METHOD 4):
weighted SVD, nearest rounding, costs weighted by the label-free Hessian. ``CovarianceFit`` (METHOD 7) has closed forms
under the covariances of the layer's inputs and output gradients. Forms depend on this protocol alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlorq.codecs.base import ZeroPoint

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.codecs.affine import Rounded
    from mlorq.codecs.trellis import TrellisMatrix

Sum = tuple[int, int, int, int]  # bits of the codes; rank, bits of A, bits of B


class LayerFit(Protocol):
    """The matrices of one layer's candidates under one metric.

    Attributes:
        weight: W, ``(out_features, in_features)``.
        percentiles: upper percentiles p of the ranges (1-p, p) that scale searches try.
        zero_point: storage of zero-points and scales (``codecs.base.Storage``); float32 scales if W needs them.
        held_out: whether the fit uses the first fold of the calibration data alone, so that costs must be measured on
            the second.
    """

    weight: Tensor
    percentiles: Sequence[float]
    zero_point: ZeroPoint
    held_out: bool

    def codes(self, bits: int) -> Rounded:
        """W as codes."""

    def trellis(self, widths: Sequence[int], sweeps: int = 1) -> list[TrellisMatrix]:
        """W as trellis codes of several numbers of bits, all columns coded again ``sweeps`` times."""

    def trellis_costs(self, widths: Sequence[int]) -> list[float]:
        """Local costs of ``trellis`` without sweeps."""

    def product(self, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        """``{"a": A, "b": B}`` with ``W ≈ A B``."""

    def factors_at(self, ranks: Sequence[int], bits_a: int, bits_b: int) -> tuple[list[Tensor], Tensor]:
        """Values close to those of ``product`` at many ranks, for less work than the fit of each.

        Args:
            ranks: in ascending order.
            bits_a, bits_b: bit-widths of A and B.

        Returns:
            A ``(out_features, r)`` of each rank r, and B ``(last rank, in_features)``, whose leading rows serve all.
        """

    def codes_and_product(self, bits: int, rank: int, bits_a: int, bits_b: int) -> dict[str, Rounded]:
        """``{"weight": Q, "a": A, "b": B}`` with ``W ≈ Q + A B``."""

    def cost(self, dense: Tensor) -> float:
        """Local cost of Ŵ ``(out_features, in_features)`` float32."""

    def float_product_costs(self) -> np.ndarray | None:
        """Local costs of the float factors at every rank, ``(full rank,)`` float64: rounding them adds to these.

        None if the fit does not know them for less work than ``product_costs``.
        """

    def product_costs(self, widths: Sequence[int], rank: int | None = None) -> dict[tuple[int, int], np.ndarray]:
        """Local costs of ``product`` at every rank, by Gram matrices.

        Args:
            widths: bit-widths of either factor.
            rank: the largest; None: full rank.

        Returns:
            ``{(bits_a, bits_b): (rank,) float64}``; entry ``r - 1`` belongs to rank r.
        """

    def sum_costs(self, wanted: Sequence[Sum]) -> list[float]:
        """Local costs of ``codes_and_product``, in the order of ``wanted``."""

    def output_metric(self) -> Tensor | None:
        """G, the second moment of the output gradients or a substitute, ``(out_features, out_features)``.

        None, which is the identity, for a layer with too many outputs for such a matrix.
        """

    def of(self, weight: Tensor) -> LayerFit:
        """The fit of another weight ``(out_features, in_features)`` of the layer under the same metric."""
