"""What the numbers of ``coverage`` and the output errors say about calibration data, in one line per finding.

Thresholds separate the measured cases of benchmarks/README.md ("Calibration data").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mlorq.calibration.coverage import Coverage

FEW_RATIO = 3.0  # error ratio between the folds, median over layers
OTHER_RATIO = 1.8  # error ratio of evaluation data to held-out calibration data, median over layers
GAP_RATIO = 2.0  # output NMSE on evaluation data over that on calibration data
SMALLEST_NMSE = 1e-4  # below, errors are too small for their ratio to matter
MOST_NAMED = 3


@dataclass(frozen=True)
class Diagnosis:
    """Calibration data against held-out data.

    Attributes:
        samples: number of calibration samples.
        layers: inputs of the layers; empty if the capture has no moments.
        nmse: output NMSE of the compressed model on ``calibration`` and ``evaluation`` data; empty if the evaluation
            data has no inputs.
    """

    samples: int
    layers: Sequence[Coverage]
    nmse: Mapping[str, float]

    @property
    def few_samples(self) -> float | None:
        """Median error ratio between the folds; None without layers."""
        return median(layer.ratio for layer in self.layers) if self.layers else None

    @property
    def other_domain(self) -> float | None:
        """Median error ratio of evaluation data to held-out calibration data; None without either."""
        found = [layer.evaluation for layer in self.layers if layer.evaluation is not None]
        return median(found) if found else None

    @property
    def gap(self) -> float | None:
        """Output NMSE on evaluation data over that on calibration data; None without evaluation inputs."""
        if not self.nmse:
            return None
        return self.nmse["evaluation"] / max(self.nmse["calibration"], 1e-30)

    def warnings(self) -> list[str]:
        """One line per finding: what was found, the worst layers, and what to do."""
        found = []
        few, other, gap = self.few_samples, self.other_domain, self.gap
        if few is not None and few > FEW_RATIO:
            worst = _named(self.layers, [layer.ratio for layer in self.layers])
            found.append(
                f"too few calibration samples: errors that {self.samples} samples hide are {few:.0f} times larger on "
                f"held-out ones (median over layers; largest: {worst}); use more samples"
            )
        if other is not None and other > OTHER_RATIO:
            worst = _named(self.layers, [layer.evaluation or 0.0 for layer in self.layers])
            found.append(
                f"calibration data is of another kind than evaluation data: errors that it hides are {other:.1f} times "
                f"larger on evaluation data (median over layers; largest: {worst}); calibrate on samples of the task"
            )
        if gap is not None and gap > GAP_RATIO and self.nmse["evaluation"] > SMALLEST_NMSE:
            found.append(
                f"output NMSE is {self.nmse['evaluation']:.3g} on evaluation data, {gap:.1f} times that on calibration "
                "data: use more samples, of the same kind as the evaluation data"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The ``calibration`` entry of a result."""
        return {
            "samples": self.samples,
            "few_samples": self.few_samples,
            "other_domain": self.other_domain,
            "nmse": dict(self.nmse),
            "gap": self.gap,
            "layers": [asdict(layer) for layer in self.layers],
            "warnings": self.warnings(),
        }


def _named(layers: Sequence[Coverage], values: Sequence[float]) -> str:
    """The layers with the largest values: ``a 12, b 11``."""
    ordered = sorted(zip(values, layers, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{layer.layer} {value:.3g}" for value, layer in ordered[:MOST_NAMED])
