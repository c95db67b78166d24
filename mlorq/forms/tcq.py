"""Form ``TCQ(k)``: trellis codes of W (METHOD 10; docs/TRELLIS.md)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mlorq.codecs.base import Codec, ZeroPoint
from mlorq.codecs.trellis import FEWEST_ROWS, GAUSSIAN_ERRORS, MOST_BITS, TrellisCodec
from mlorq.forms.base import FORMS, Candidate, Form, Shape
from mlorq.memory import WIDEST
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.codecs.trellis import TrellisMatrix
    from mlorq.fitting.base import LayerFit

CODED = 3  # most bits whose local costs are computed
VITERBI_WORK = 10.0 * 2**12  # multiply-adds of a matrix product in the time that coding a weight takes, on CPUs


class TCQSettings(Settings):
    """Candidates of form TCQ."""

    trellis_bits: list[Annotated[int, Field(ge=1, le=MOST_BITS)]] = Field(
        [1, 2, 3, 4, 5, 6], description="bits per weight of trellis codes"
    )


class TCQ(Form[TCQSettings]):
    """Trellis codes of W."""

    name = "TCQ"
    label = "trellis codes"
    colour = "#7a4fa3"
    settings = TCQSettings
    terms = (("weight",),)
    separate = False
    by_default = False

    def serves(self, shape: Shape) -> bool:
        """Whether a column has enough rows to fill a state, and not too many for the metric of outputs (METHOD 7)."""
        return FEWEST_ROWS <= shape.out_features <= WIDEST

    def supersedes(self, settings: TCQSettings) -> int:
        return max(settings.trellis_bits, default=0)

    def enumerate(self, shape: Shape, settings: TCQSettings) -> list[Candidate]:
        return [Candidate(self.name, bits=bits) for bits in sorted(set(settings.trellis_bits))]

    def candidate_id(self, candidate: Candidate) -> str:
        return f"TCQ{candidate.bits}"

    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        if candidate.bits is None or (candidate.bits_a, candidate.bits_b, candidate.rank) != (None, None, None):
            raise ValueError(f"form TCQ takes bits alone: {candidate}")
        return {"weight": TrellisCodec(candidate.bits)}

    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        return {"weight": (shape.out_features, shape.in_features)}

    def largest(self, shape: Shape) -> Candidate:
        return Candidate(self.name, bits=MOST_BITS)

    def fit(self, fit: LayerFit, candidate: Candidate) -> dict[str, TrellisMatrix]:
        assert candidate.bits is not None, candidate
        return {"weight": fit.trellis([candidate.bits])[0]}

    def dense(self, fit: LayerFit, candidate: Candidate) -> Tensor:
        """Ŵ of codes of one pass, like those of the local costs; rounding codes all columns again."""
        assert candidate.bits is not None, candidate
        return fit.trellis([candidate.bits], sweeps=0)[0].dequantize()

    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> list[float]:
        """Costs of up to ``CODED`` bits, and ``cost_k = cost_m · D_k / D_m`` with ``m = CODED`` beyond.

        D is the mean squared error of the codes on Gaussian weights. Rotated weights are nearly Gaussian: the ratio
        holds within 3 % (METHOD 10).
        """
        wanted = {candidate.bits or 0 for candidate in candidates}
        coded = sorted({min(bits, CODED) for bits in wanted})
        found = dict(zip(coded, fit.trellis_costs(coded), strict=True))
        for bits in wanted - found.keys():
            found[bits] = found[CODED] * GAUSSIAN_ERRORS[bits - 1] / GAUSSIAN_ERRORS[CODED - 1]
        return [found[candidate.bits or 0] for candidate in candidates]

    def curve(self, candidate: Candidate) -> Hashable:
        return self.name

    def position(self, candidate: Candidate) -> int:
        return candidate.bits or 0

    def fitting_work(self, shape: Shape, settings: TCQSettings, percentiles: int) -> tuple[float, float]:
        coded = len({min(bits, CODED) for bits in settings.trellis_bits})
        return VITERBI_WORK * shape.out_features * shape.in_features * coded, 0.0

    def measurements(self, settings: TCQSettings, points: int) -> int:
        return min(points, len(settings.trellis_bits))


FORMS.register(TCQ())
