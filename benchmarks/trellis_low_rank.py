"""Whether factors of the residual pay on top of trellis codes: held-out local costs at the same bytes.

    .venv/bin/python benchmarks/trellis_low_rank.py examples/minilm.yaml [--every 5] [--set KEY=VALUE]

For every n-th layer: W as trellis codes of k bits plus ``A B`` of the residual (factors of 4 bits, two turns as for
QLR), against trellis codes alone at the same bytes. Codes alone have whole bits: their cost at the bytes between is
interpolated, linearly (a mixture of the two widths over parts of the model has that cost) and in logarithms. Numbers
above 1 say that factors do not pay.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
from layer_fits import layer_fits
from table import arguments_of_a_run

from mlorq.codecs.affine import AffineCodec
from mlorq.codecs.trellis import TrellisCodec
from mlorq.fitting.covariance_fit import CovarianceFit

WIDTHS = (1, 2, 3, 4)
RANKS = (4, 8, 16, 32)
FACTOR_BITS = 4


def cost_with_factors(fit: CovarianceFit, bits: int, rank: int) -> float:
    """The least cost in two turns of codes of W minus the product, and the product for W minus the codes."""
    costs, left = [], fit.weight
    for _ in range(2):
        codes = fit.of(left).trellis([bits])[0].dequantize().double()
        factors = fit.of(fit.weight - codes).product(rank, FACTOR_BITS, FACTOR_BITS)
        values = {name: part.dequantize().double() for name, part in factors.items()}
        found = values["a"] @ values["b"]
        costs.append(fit.cost((codes + found).float()))
        left = fit.weight - found
    return min(costs)


def main() -> None:
    """Print geometric means over layers, a row for each width and rank."""
    parser = arguments_of_a_run()
    parser.add_argument("--every", type=int, default=5, help="layers to leave out between two")
    arguments = parser.parse_args()
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for layer, fit in layer_fits(arguments):
        rows, columns = layer.out_features, layer.in_features
        size = [TrellisCodec(bits).size(rows, columns) for bits in WIDTHS]
        alone = [fit.cost(codes.dequantize()) for codes in fit.trellis(WIDTHS)]
        codec = AffineCodec(FACTOR_BITS)
        for bits, rank in product(WIDTHS[:-1], RANKS):
            cost = cost_with_factors(fit, bits, rank)
            whole = size[bits - 1] + codec.size(rows, rank) + codec.size(rank, columns)
            linear, logarithmic = np.interp(whole, size, alone), np.exp(np.interp(whole, size, np.log(alone)))
            found[bits, rank].append((cost / alone[bits - 1], cost / linear, cost / logarithmic))
    print("| bits | rank | cost / codes of the same bits | / at the same bytes, linear | / logarithmic |")
    print("|---|---|---|---|---|")
    for (bits, rank), ratios in found.items():
        means = np.exp(np.log(ratios).mean(0))
        print(f"| {bits} | {rank} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
