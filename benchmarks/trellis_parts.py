"""What the parts of the trellis encoder are worth: held-out local costs over those of the encoder as it is.

    .venv/bin/python benchmarks/trellis_parts.py examples/minilm.yaml [--every 5] [--set KEY=VALUE]

Geometric means over every n-th layer. "Costs from one cycle" are the estimates of the search
(``mlorq.fitting.trellis_costs``) over the costs of all codes, with the standard deviation of their logarithm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
from layer_fits import layer_fits
from table import arguments_of_a_run

from mlorq.codecs import trellis, trellis_decoding
from mlorq.fitting import trellis as encoder
from mlorq.fitting.covariance_fit import CovarianceFit

WIDTHS = (1, 2, 3, 4)
AS_IT_IS = "as it is"


def costs(fit: CovarianceFit, sweeps: int = 1) -> list[float]:
    """Local costs of the codes of all widths."""
    return [fit.cost(codes.dequantize()) for codes in fit.trellis(WIDTHS, sweeps)]


def with_damping(fit: CovarianceFit, damping: float) -> list[float]:
    """Costs with another damping of G."""
    with patch.object(encoder, "ROW_DAMPING", damping):
        return costs(anew(fit))


def in_own_order(fit: CovarianceFit) -> list[float]:
    """Costs with the rows in the order of the matrix."""
    with rows_in_order():
        return costs(anew(fit))


def unrotated(fit: CovarianceFit) -> list[float]:
    """Costs without a rotation of the columns."""
    return costs(anew(fit, rotation=None))


def anew(fit: CovarianceFit, rotation: int | None = 0) -> CovarianceFit:
    """The same fit without what it has computed."""
    return CovarianceFit(fit.weight, fit.metric, fit.percentiles, fit.zero_point, rotation, judge=fit.judge)


@contextmanager
def rows_in_order() -> Iterator[None]:
    """The stream of rows without its pseudo-random order, for encoder and decoder."""
    stream = trellis.stream

    def natural(rows: int) -> trellis.Stream:
        found = stream(rows)
        return found._replace(order=np.arange(rows), place=np.arange(rows))

    users = [module for module in (trellis, trellis_decoding, encoder) if hasattr(module, "stream")]
    patches = [patch.object(module, "stream", natural) for module in users]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


VARIANTS: dict[str, Callable[[CovarianceFit], list[float]]] = {
    "columns coded once": partial(costs, sweeps=0),
    "columns coded three times": partial(costs, sweeps=2),
    **{f"G damped by {damping:g}": partial(with_damping, damping=damping) for damping in (0.01, 0.1, 10.0, 1e9)},
    "rows in the order of the matrix": in_own_order,
    "no rotation": unrotated,
}


def main() -> None:
    """Print a row a variant, as Markdown."""
    parser = arguments_of_a_run()
    parser.add_argument("--every", type=int, default=5, help="layers to leave out between two")
    arguments = parser.parse_args()
    found: dict[str, list[list[float]]] = defaultdict(list)
    estimates = []
    for _, fit in layer_fits(arguments):
        found[AS_IT_IS].append(costs(fit))
        for name, variant in VARIANTS.items():
            found[name].append(variant(fit))
        estimates.append(np.log(np.array(fit.trellis_costs(WIDTHS)) / costs(fit, sweeps=0)))
    print(f"| {len(estimates)} layers | " + " | ".join(f"{bits} bit" for bits in WIDTHS) + " |")
    print("|---|" + "---|" * len(WIDTHS))
    for name in VARIANTS:
        ratios = np.exp((np.log(found[name]) - np.log(found[AS_IT_IS])).mean(0))
        print(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    means, deviations = np.mean(estimates, 0), np.std(estimates, 0)
    cells = [f"{np.exp(mean):.3f} ± {deviation:.3f}" for mean, deviation in zip(means, deviations, strict=True)]
    print("| costs from one cycle, over those of all codes | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
