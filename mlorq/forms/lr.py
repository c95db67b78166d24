"""Form ``LR(r, bA, bB)``: codes of two factors, ``W ≈ A B`` (METHOD 1, 4)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product
from typing import TYPE_CHECKING

from pydantic import Field

from mlorq.codecs.affine import AffineCodec
from mlorq.codecs.base import Codec, ZeroPoint
from mlorq.field_types import BitWidths
from mlorq.forms.base import FORMS, SVD_WORK, Candidate, Form, Shape
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.codecs.affine import Rounded
    from mlorq.fitting.base import LayerFit

SMALLEST_RANK = 2


class LRSettings(Settings):
    """Candidates of form LR."""

    factor_bits: BitWidths = Field([4, 6, 8], description="bit-widths of low-rank factors; [] for none")
    rank_multiple: int = Field(1, ge=1, description="ranks are multiples of this (1: the paper; 8 or 16: hardware)")


class LR(Form[LRSettings]):
    """Codes of two factors, ``W ≈ A B``."""

    name = "LR"
    label = "low-rank factors"
    colour = "#d1662f"
    settings = LRSettings
    terms = (("a", "b"),)

    def enumerate(self, shape: Shape, settings: LRSettings) -> list[Candidate]:
        step, most = settings.rank_multiple, min(shape.out_features, shape.in_features)
        return [
            Candidate(self.name, bits_a=bits_a, bits_b=bits_b, rank=rank)
            for bits_a, bits_b in product(settings.factor_bits, repeat=2)
            for rank in range(max(step, SMALLEST_RANK), most + 1, step)
        ]

    def candidate_id(self, candidate: Candidate) -> str:
        return f"LR{candidate.rank}-{candidate.bits_a}-{candidate.bits_b}"

    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        if candidate.bits is not None:
            raise ValueError(f"form LR takes rank, bits_a and bits_b alone: {candidate}")
        return factor_codecs(candidate, zero_point)

    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        return factor_sizes(candidate, shape)

    def largest(self, shape: Shape) -> Candidate:
        return Candidate(self.name, bits_a=8, bits_b=8, rank=longest_rank(shape))

    def fit(self, fit: LayerFit, candidate: Candidate) -> dict[str, Rounded]:
        rank, bits_a, bits_b = candidate.rank, candidate.bits_a, candidate.bits_b
        assert rank and bits_a and bits_b, candidate  # noqa: PT018
        return fit.product(rank, bits_a, bits_b)

    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> list[float]:
        """One Gram matrix gives the costs of all ranks of a pair of bit-widths (METHOD 4)."""
        widths = sorted({bits for one in candidates for bits in (one.bits_a, one.bits_b) if bits})
        costs = fit.product_costs(widths, max(one.rank or 0 for one in candidates))
        return [float(costs[one.bits_a or 0, one.bits_b or 0][(one.rank or 0) - 1]) for one in candidates]

    def local_bounds(self, fit: LayerFit, candidates: Sequence[Candidate]) -> list[float] | None:
        """Costs of the float factors."""
        costs = fit.float_product_costs()
        return None if costs is None else [float(costs[(one.rank or 0) - 1]) for one in candidates]

    def curve(self, candidate: Candidate) -> Hashable:
        return candidate.bits_a, candidate.bits_b

    def factors(self, fit: LayerFit, candidates: Sequence[Candidate]) -> tuple[list[Tensor], Tensor]:
        bits_a, bits_b = candidates[-1].bits_a, candidates[-1].bits_b
        assert bits_a and bits_b, candidates[-1]  # noqa: PT018
        return fit.factors_at([candidate.rank or 0 for candidate in candidates], bits_a, bits_b)

    def fitting_work(self, shape: Shape, settings: LRSettings, percentiles: int) -> tuple[float, float]:
        rows, columns, _ = shape
        widths, rank = len(settings.factor_bits), min(rows, columns)
        # The scale search of A multiplies by B for every percentile.
        products = rows * columns * rank * (SVD_WORK + percentiles * widths)
        return products, rank * (rows + columns) * widths

    def costing_work(self, shape: Shape, settings: LRSettings) -> tuple[float, float]:
        rows, columns, _ = shape
        widths, rank = len(settings.factor_bits), min(rows, columns)
        return widths * rank * rank * (rows + columns) * 2, widths * widths * rank * rank

    def measurements(self, settings: LRSettings, points: int) -> int:
        return len(settings.factor_bits) ** 2 * points


def factor_codecs(candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
    """Codecs of A and B.

    Raises:
        ValueError: the candidate lacks its rank or a bit-width.
    """
    if candidate.rank is None or candidate.bits_a is None or candidate.bits_b is None:
        raise ValueError(f"form {candidate.form} takes rank, bits_a and bits_b: {candidate}")
    return {"a": AffineCodec(candidate.bits_a, zero_point), "b": AffineCodec(candidate.bits_b, zero_point)}


def factor_sizes(candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
    """Sizes of A, ``(out_features, rank)``, and of B, ``(rank, in_features)``."""
    rank = candidate.rank or 0
    return {"a": (shape.out_features, rank), "b": (rank, shape.in_features)}


def longest_rank(shape: Shape) -> int:
    """A number with at least as many digits as any rank."""
    return max(1000, shape.out_features * shape.in_features)


FORMS.register(LR())
