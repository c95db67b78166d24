"""Whether factors pay if they are trellis codes themselves: held-out local costs at the same bytes.

    .venv/bin/python benchmarks/trellis_factors.py examples/minilm.yaml [--every 5] [--set KEY=VALUE]

For every n-th layer and several ranks: ``W ≈ A B`` with both factors as trellis codes of k bits (B under Σ and AᵀGA,
then the least-squares A under G and B̂ΣB̂ᵀ), over factors with affine codes of k bits, and over trellis codes of W itself
at the same bytes (between whole bits, interpolated in logarithms; below 1 bit there are none). Geometric means.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
import torch
from layer_fits import layer_fits
from table import arguments_of_a_run

from mlorq.codecs.trellis import FEWEST_ROWS, TrellisCodec
from mlorq.fitting.covariance_fit import CovarianceFit
from mlorq.fitting.trellis import TrellisFit

SHARES = (1 / 8, 1 / 4, 1 / 2)  # ranks, of the full one
WIDTHS = (3, 4)
WHOLE = (1, 2, 3, 4)


def trellis_factors_cost(fit: CovarianceFit, rank: int, bits: int) -> float:
    """Local cost of factors with trellis codes."""
    sigma, gradients, weight = fit.metric.inputs, fit.metric.gradients, fit.weight
    assert gradients is not None
    a, b = fit.factors.a[:, :rank], fit.factors.b[:rank]
    right = TrellisFit(sigma, a.T @ gradients @ a, fit.rotation).codes(b, bits).dequantize().double()
    gram = right @ sigma @ right.T
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(rank, dtype=torch.float64)
    best = torch.linalg.solve(gram, right @ sigma @ weight.T).T
    left = TrellisFit(gram, gradients, fit.rotation).codes(best, bits).dequantize().double()
    return fit.cost((left @ right).float())


def main() -> None:
    """Print geometric means over layers, a row for each rank and width."""
    parser = arguments_of_a_run()
    parser.add_argument("--every", type=int, default=5, help="layers to leave out between two")
    arguments = parser.parse_args()
    found: dict[tuple[float, int], list[tuple[float, float]]] = defaultdict(list)
    for layer, fit in layer_fits(arguments):
        rows, columns = layer.out_features, layer.in_features
        size = [TrellisCodec(bits).size(rows, columns) for bits in WHOLE]
        alone = np.log([fit.cost(codes.dequantize()) for codes in fit.trellis(WHOLE)])
        for share, bits in product(SHARES, WIDTHS):
            rank = round(share * min(rows, columns))
            if rank < FEWEST_ROWS:
                continue
            cost = trellis_factors_cost(fit, rank, bits)
            affine = {name: part.dequantize() for name, part in fit.product(rank, bits, bits).items()}
            whole = TrellisCodec(bits).size(rows, rank) + TrellisCodec(bits).size(rank, columns)
            same = np.exp(np.interp(whole, size, alone)) if whole >= size[0] else 0.0
            found[share, bits].append((cost / fit.cost(affine["a"] @ affine["b"]), cost / same if same else 0.0))
    print("| rank, of the full one | bits | cost / affine factors | / trellis codes of the same bytes |")
    print("|---|---|---|---|")
    for (share, bits), ratios in found.items():
        columns_of_ratios = [[ratio for ratio in column if ratio] for column in zip(*ratios, strict=True)]
        means = [f"{np.exp(np.log(column).mean()):.3f}" if column else "" for column in columns_of_ratios]
        print(f"| {share:g} | {bits} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
