"""What two or three widths within one layer would give: trellis codes with more bits for the rows that matter more.

    .venv/bin/python benchmarks/trellis_rows.py examples/minilm.yaml --every 5

A layer's cost is a sum over its rows. They are sorted by what they lose at k bits and split into groups of the length
of a cycle; each group gets k - 1, k or k + 1 bits, at a mean of k, so that the summed costs are least. This is what
widths by cycle could give at most: rows could no longer be coded in random order, and headers are left out. Columns are
alike once they are rotated. The integer program mixes widths over layers in any case.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from layer_fits import layer_fits
from table import arguments_of_a_run

from mlorq.codecs.trellis import BLOCK_ROWS
from mlorq.fitting.covariance_fit import CovarianceFit

WIDTHS = (2, 3, 4)


def row_costs(fit: CovarianceFit) -> np.ndarray:
    """What every row adds to the cost of codes of every width, ``(widths, rows)``; the sum over rows is the cost."""
    metric, found = fit.metric, []
    for codes in fit.trellis(WIDTHS):
        change = codes.dequantize().double() - fit.weight.double()
        left = change if metric.gradients is None else metric.gradients @ change
        found.append(((change @ metric.inputs) * left).sum(1).cpu().numpy())
    return np.stack(found)


def mixed(costs: np.ndarray, width: int) -> float:
    """The least sum with one of three widths per group at the mean of the middle one, by a price of bits.

    Args:
        costs: ``(widths, groups)``.
        width: index of the middle width.
    """
    shifts = np.arange(len(costs)) - width
    best = float(costs[width].sum())
    for price in np.geomspace(1e-9, 1e3, 400) * costs[width].mean():
        chosen = (costs + price * shifts[:, None]).argmin(0)
        if shifts[chosen].sum() <= 0:
            best = min(best, float(costs[chosen, np.arange(costs.shape[1])].sum()))
    return best


def main() -> None:
    """Print a row a layer, as Markdown."""
    parser: argparse.ArgumentParser = arguments_of_a_run()
    parser.add_argument("--every", type=int, default=5, help="every n-th layer")
    arguments = parser.parse_args()
    print(
        f"| layer | rows | mixed over groups of {BLOCK_ROWS} rows | over single rows |\n|---|---|---|---|", flush=True
    )
    ratios = []
    for layer, fit in layer_fits(arguments):
        rows = row_costs(fit)
        order = rows[1].argsort()[::-1]
        groups = np.array_split(order, max(1, round(len(order) / BLOCK_ROWS)))
        grouped = np.stack([rows[:, group].sum(1) for group in groups], axis=1)
        found = [mixed(part, 1) / rows[1].sum() for part in (grouped, rows)]
        ratios.append(found)
        print(f"| {layer.name} | {len(order)} | {found[0]:.3f} | {found[1]:.3f} |", flush=True)
    means = torch.tensor(ratios).log().mean(0).exp().tolist()
    print(f"| geometric mean | | {means[0]:.3f} | {means[1]:.3f} |")


if __name__ == "__main__":
    main()
