"""A thousand allocations of a hundred layers: seconds of the exact solver, and the same budgets in an integer program.

    .venv/bin/python benchmarks/allocations.py [--layers 100] [--budgets 1000] [--checked 20]

Fronts are made: of each layer some 60 candidates whose costs fall with their bytes as 4^-bits, times noise. Every
``checked``-th part of the budgets is solved by HiGHS as well; the two may differ by HiGHS's own gap alone.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mlorq.allocation.choices import Choices
from mlorq.allocation.program import Program, solve

WIDTHS = np.linspace(1.5, 8, 60)
GAP = 1e-6


def choices(layers: int, seed: int) -> list[Choices]:
    """Made fronts of layers of transformers' sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(layers):
        params = int(rng.choice([384 * 384, 384 * 1536, 768 * 768, 768 * 3072]))
        size = np.unique((params * WIDTHS / 8 * rng.uniform(0.97, 1.03, len(WIDTHS))).astype(np.int64))
        sensitivity = params * 10.0 ** rng.uniform(-9, -6)
        cost = sensitivity * 4.0 ** (-8 * size / params) * rng.uniform(0.8, 1.2, len(size))
        found.append(Choices(f"layer {index}", cost, size))
    return found


def main() -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--budgets", type=int, default=1000)
    parser.add_argument("--checked", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    layers = choices(arguments.layers, arguments.seed)
    most, least = (sum(int(getattr(one.size, name)()) for one in layers) for name in ("max", "min"))
    budgets = np.linspace(least, most, arguments.budgets + 2)[1:-1].astype(int)
    started = time.perf_counter()
    exact = [solve(Program(layers, int(budget))) for budget in budgets]
    seconds = time.perf_counter() - started
    solvers = {one.report.name for one in exact}
    ratios, checking = [], 0.0
    for place in range(0, len(budgets), max(1, len(budgets) // arguments.checked)):
        started = time.perf_counter()
        other = solve(Program(layers, int(budgets[place])), solver="highs", gap=GAP)
        checking += time.perf_counter() - started
        ratios.append(exact[place].report.objective / other.report.objective)
    print("| layers | candidates | budgets | solver | seconds | a budget, ms | HiGHS, ms | objective over HiGHS's |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {len(layers)} | {sum(len(one.size) for one in layers):,} | {len(budgets)} | {', '.join(sorted(solvers))} "
        f"| {seconds:.2f} | {seconds / len(budgets) * 1e3:.2f} | {checking / len(ratios) * 1e3:.0f} "
        f"| {min(ratios):.7f} to {max(ratios):.7f} ({len(ratios)} budgets) |"
    )


if __name__ == "__main__":
    main()
