"""Form ``QLR(b, r, bA, bB)``: codes plus factors of the residual, ``W ≈ Q_b + A B`` (METHOD 1, 7)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mlorq.codecs.affine import AffineCodec
from mlorq.codecs.base import Codec, ZeroPoint
from mlorq.field_types import BitWidths
from mlorq.forms.base import FORMS, SVD_WORK, Candidate, Form, Shape
from mlorq.forms.lr import SMALLEST_RANK, factor_codecs, factor_sizes, longest_rank
from mlorq.registry import Settings

if TYPE_CHECKING:
    from mlorq.codecs.affine import Rounded
    from mlorq.fitting.base import LayerFit


class QLRSettings(Settings):
    """Candidates of form QLR."""

    sum_bits: BitWidths = Field([2, 3, 4], description="bit-widths of the codes")
    sum_factor_bits: BitWidths = Field([4], description="bit-widths of the factors")
    sum_ranks: list[int] = Field([4, 8, 16, 32], description="ranks")


class QLR(Form[QLRSettings]):
    """Codes, and factors of the residual."""

    name = "QLR"
    label = "codes and low-rank factors"
    colour = "#3c8d5a"
    settings = QLRSettings
    terms = (("weight",), ("a", "b"))
    by_default = False

    def enumerate(self, shape: Shape, settings: QLRSettings) -> list[Candidate]:
        return [
            Candidate(self.name, bits=bits, bits_a=width, bits_b=width, rank=rank)
            for bits in settings.sum_bits
            for width in settings.sum_factor_bits
            for rank in settings.sum_ranks
            if SMALLEST_RANK <= rank <= min(shape.out_features, shape.in_features)
        ]

    def candidate_id(self, candidate: Candidate) -> str:
        return f"Q{candidate.bits}+LR{candidate.rank}-{candidate.bits_a}-{candidate.bits_b}"

    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        if candidate.bits is None:
            raise ValueError(f"form QLR takes bits, rank, bits_a and bits_b: {candidate}")
        return {"weight": AffineCodec(candidate.bits, zero_point), **factor_codecs(candidate, zero_point)}

    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        return {"weight": (shape.out_features, shape.in_features), **factor_sizes(candidate, shape)}

    def largest(self, shape: Shape) -> Candidate:
        return Candidate(self.name, bits=8, bits_a=8, bits_b=8, rank=longest_rank(shape))

    def fit(self, fit: LayerFit, candidate: Candidate) -> dict[str, Rounded]:
        return fit.codes_and_product(*_numbers(candidate))

    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> list[float]:
        return fit.sum_costs([_numbers(candidate) for candidate in candidates])

    def curve(self, candidate: Candidate) -> Hashable:
        return candidate.bits, candidate.bits_a, candidate.bits_b

    def fitting_work(self, shape: Shape, settings: QLRSettings, percentiles: int) -> tuple[float, float]:
        rows, columns, _ = shape
        rank = min(rows, columns)
        return SVD_WORK * rows * columns * rank, rank * (rows + columns) * len(settings.sum_factor_bits)

    def measurements(self, settings: QLRSettings, points: int) -> int:
        return len(settings.sum_bits) * len(settings.sum_factor_bits) * points


def _numbers(candidate: Candidate) -> tuple[int, int, int, int]:
    bits, rank, bits_a, bits_b = candidate.bits, candidate.rank, candidate.bits_a, candidate.bits_b
    assert bits and rank and bits_a and bits_b, candidate  # noqa: PT018
    return bits, rank, bits_a, bits_b


FORMS.register(QLR())
