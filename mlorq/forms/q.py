"""Form ``Q(b)``: codes of W (METHOD 1)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mlorq.codecs.affine import AffineCodec
from mlorq.codecs.base import Codec, ZeroPoint
from mlorq.field_types import BitWidths
from mlorq.forms.base import FORMS, Candidate, Form, Shape
from mlorq.registry import Settings

if TYPE_CHECKING:
    from mlorq.codecs.affine import Rounded
    from mlorq.fitting.base import LayerFit


class QSettings(Settings):
    """Candidates of form Q."""

    bits: BitWidths = Field([2, 3, 4, 6, 8], description="bit-widths of quantize-only candidates")

    def check(self) -> None:
        if not self.bits:
            raise ValueError("bits must list at least one bit-width")


class Q(Form[QSettings]):
    """Codes of W."""

    name = "Q"
    label = "codes"
    colour = "#2f6fb0"
    settings = QSettings
    terms = (("weight",),)
    uniform = True

    def enumerate(self, shape: Shape, settings: QSettings) -> list[Candidate]:
        return [Candidate(self.name, bits=bits) for bits in settings.bits]

    def candidate_id(self, candidate: Candidate) -> str:
        return f"Q{candidate.bits}"

    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        if candidate.bits is None or (candidate.bits_a, candidate.bits_b, candidate.rank) != (None, None, None):
            raise ValueError(f"form Q takes bits alone: {candidate}")
        return {"weight": AffineCodec(candidate.bits, zero_point)}

    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        return {"weight": (shape.out_features, shape.in_features)}

    def largest(self, shape: Shape) -> Candidate:
        return Candidate(self.name, bits=8)

    def fit(self, fit: LayerFit, candidate: Candidate) -> dict[str, Rounded]:
        assert candidate.bits is not None, candidate
        return {"weight": fit.codes(candidate.bits)}

    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> list[float]:
        return [fit.cost(self.dense(fit, candidate)) for candidate in candidates]

    def curve(self, candidate: Candidate) -> Hashable:
        return candidate.bits  # each candidate is its own curve: all are measured

    def fitting_work(self, shape: Shape, settings: QSettings, percentiles: int) -> tuple[float, float]:
        return 0.0, shape.out_features * shape.in_features * len(settings.bits)

    def measurements(self, settings: QSettings, points: int) -> int:
        return len(settings.bits)


FORMS.register(Q())
