"""The Pareto front of cost against memory and, where asked, compute: one sort and one sweep."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray


def pareto_front(
    cost: NDArray[np.float64], size: NDArray[np.int64], load: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """Mark the points that are non-dominated in (cost, size, load).

    A point is dominated by another one that is at most as large in all of them and smaller in at least one. Of equal
    points the first is kept.

    Args:
        cost: ``(points,)``.
        size: ``(points,)``.
        load: ``(points,)``; None: the same for all points.

    Returns:
        ``(points,)`` bool.
    """
    front = np.zeros(len(cost), dtype=bool)
    if load is not None:
        front[_three(cost, size, load)] = True
        return front
    order = np.lexsort((np.arange(len(cost)), cost, size))
    ordered = cost[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    front[order[ordered < before]] = True
    return front


def _three(cost: NDArray[np.float64], size: NDArray[np.int64], load: NDArray[np.float64]) -> list[int]:
    """Indices of the non-dominated points of three measures.

    In the order of (size, load, cost) a point can only be dominated by, or equal to, one before it: by one with at most
    its load and cost. Of those before, the front in (load, cost) is enough, a staircase: loads rise, costs fall.
    """
    kept: list[int] = []
    loads: list[float] = []
    costs: list[float] = []
    for index in np.lexsort((np.arange(len(cost)), cost, load, size)).tolist():
        at, own = float(load[index]), float(cost[index])
        below = bisect_right(loads, at)
        if below and costs[below - 1] <= own:
            continue
        kept.append(index)
        start = bisect_left(loads, at)
        end = start
        while end < len(loads) and costs[end] >= own:  # steps that the point makes superfluous
            end += 1
        loads[start:end], costs[start:end] = [at], [own]
    return kept
