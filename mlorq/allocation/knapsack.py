"""The program without widths, solved exactly: a multiple-choice knapsack problem (METHOD 5).

    min Σ_ℓ value_ℓ[c_ℓ]   subject to   Σ_ℓ size_ℓ[c_ℓ] ≤ budget.

For every λ ≥ 0, ``L(λ) = Σ_ℓ min_c (value_ℓc + λ size_ℓc) - λ budget`` is a lower bound of the optimum (Lagrange). Any
allocation with candidate c in layer ℓ costs at least L(λ) plus the reduced cost of c, its distance from the minimum of
its layer. A feasible allocation of value U is found on the way, so every candidate with a reduced cost above
``U - L(λ)`` can be dropped (reduced-cost fixing); a few remain. Layers are then added one by one to a list of partial
allocations, of which only those remain that are non-dominated in (size, value) and whose bound does not exceed U
(Nemhauser and Ullmann, 1969).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BISECTIONS = 60  # of λ: as many as a double has bits to decide
MOST_CHANGES = 400  # of single layers that are tried in pairs
MOST_PARTIAL = 2_000_000  # partial allocations at once, about 100 MB; a solver is faster then
ROUNDING = 1e-11  # relative error of bounds, which are sums of floats


def least_value(values: Sequence[Floats], sizes: Sequence[Integers], budget: int) -> list[int] | None:
    """The allocation of least value; among equal ones, one that only depends on the order of the candidates.

    Args:
        values: ``(candidates,)`` per layer.
        sizes: ``(candidates,)`` per layer, bytes.
        budget: largest sum of sizes; at least that of the smallest candidates.

    Returns:
        The index of each layer's candidate; None if there are too many partial allocations.
    """
    value, size = _padded(values, np.inf), _padded([own.astype(np.float64) for own in sizes], 0.0)
    bound, price, picked = _relaxed(value, size, budget)
    picked = _improved(value, size, budget, picked, price, bound)
    rows = np.arange(len(value))
    upper = float(value[rows, picked].sum())
    upper += ROUNDING * (abs(upper) + price * budget)
    reduced = value + price * size
    reduced -= reduced.min(axis=1, keepdims=True)
    kept = [np.flatnonzero(own <= upper - bound) for own in reduced]
    # The incumbent's candidates belong to a solution as good as U, so no layer is left without candidates.
    kept = [np.union1d(own, [place]) for own, place in zip(kept, picked, strict=True)]
    return _merged(values, sizes, budget, kept, price, upper)


def _padded(rows: Sequence[Floats], fill: float) -> Floats:
    """Rows of different lengths as one matrix."""
    found = np.full((len(rows), max(map(len, rows))), fill)
    for index, row in enumerate(rows):
        found[index, : len(row)] = row
    return found


def _relaxed(value: Floats, size: Floats, budget: int) -> tuple[float, float, Integers]:
    """The best Lagrangian bound, its price λ, and the allocation of the least price found whose size is feasible."""
    rows = np.arange(len(value))

    def at(price: float) -> tuple[Integers, float, float]:
        total = value + price * size
        picked = total.argmin(axis=1)
        return picked, float(total[rows, picked].sum()) - price * budget, float(size[rows, picked].sum())

    finite = value[np.isfinite(value)]
    low, high = 0.0, max(float(finite.max() - finite.min()), 1e-300)
    picked, bound, taken = at(low)
    best = (bound, low)
    if taken <= budget:
        return bound, low, picked
    picked, bound, taken = at(high)
    while taken > budget:
        high *= 4.0
        picked, bound, taken = at(high)
    best = max(best, (bound, high))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried, bound, taken = at(middle)
        best = max(best, (bound, middle))
        if taken <= budget:
            high, picked = middle, tried
        else:
            low = middle
    return *best, picked


def _improved(value: Floats, size: Floats, budget: int, picked: Integers, price: float, bound: float) -> Integers:
    """A feasible allocation after changes of one layer or of two at once, the best one first, as long as any helps.

    Only changes to candidates that a better allocation can have are tried: of small reduced cost at the price of the
    bound. Most of what single changes leave is mended by pairs, one layer larger and one smaller.
    """
    rows, picked = np.arange(len(value)), picked.copy()
    reduced = value + price * size
    reduced -= reduced.min(axis=1, keepdims=True)
    while True:
        room = value[rows, picked].sum() - bound
        layer, place = np.nonzero(reduced <= room)
        nearest = np.argsort(reduced[layer, place], kind="stable")[:MOST_CHANGES]
        layer, place = layer[nearest], place[nearest]
        lower = np.append(value[layer, place] - value[layer, picked[layer]], 0.0)  # the last change is none
        larger = np.append(size[layer, place] - size[layer, picked[layer]], 0.0)
        possible = larger[:, None] + larger <= budget - size[rows, picked].sum()
        possible[:-1, :-1] &= layer[:, None] != layer
        change = np.where(possible, lower[:, None] + lower, 0.0)
        pair = np.unravel_index(change.argmin(), change.shape)
        if not change[pair] < 0:
            return picked
        for one in pair:
            if one < len(layer):
                picked[layer[one]] = place[one]


def _merged(
    values: Sequence[Floats],
    sizes: Sequence[Integers],
    budget: int,
    kept: Sequence[Integers],
    price: float,
    upper: float,
) -> list[int] | None:
    """The best allocation of the kept candidates; None if there are too many partial allocations."""
    order = sorted(range(len(kept)), key=lambda layer: len(kept[layer]))
    least = [float((values[layer][kept[layer]] + price * sizes[layer][kept[layer]]).min()) for layer in order]
    rest = np.append(np.cumsum(least[::-1])[::-1], 0.0) - price * budget  # bound of the layers still to come
    value, size = np.zeros(1), np.zeros(1, dtype=np.int64)
    steps: list[tuple[Integers, Integers]] = []  # per layer: the partial allocation that is extended, and by what
    for index, layer in enumerate(order, 1):
        own = kept[layer]
        if len(value) * len(own) > MOST_PARTIAL:
            return None
        value = (value[:, None] + values[layer][own]).ravel()
        size = (size[:, None] + sizes[layer][own]).ravel()
        possible = np.flatnonzero((size <= budget) & (value + price * size + rest[index] <= upper))
        # By size, then by value: non-dominated are those of less value than all before them.
        possible = possible[np.lexsort((value[possible], size[possible]))]
        before = np.minimum.accumulate(np.append(np.inf, value[possible][:-1]))
        possible = possible[value[possible] < before]
        value, size = value[possible], size[possible]
        steps.append((possible // len(own), own[possible % len(own)]))
    state, found = len(value) - 1, [0] * len(order)  # the last one has the least value
    for layer, (parent, place) in zip(reversed(order), reversed(steps), strict=True):
        found[layer] = int(place[state])
        state = int(parent[state])
    return found
