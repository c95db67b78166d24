"""The Pareto front in cost, bytes and, optionally, further measures: one sort and one sweep."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray


def pareto_front(
    cost: NDArray[np.float64], size: NDArray[np.int64], *further: NDArray[np.float64] | NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Mark the points that are non-dominated in all measures.

    A point is dominated by another one that is no larger in all of them and smaller in at least one. Of equal points
    the first is kept.

    Args:
        cost: ``(points,)`` costs.
        size: ``(points,)`` bytes.
        further: ``(points,)`` each: bit operations, bytes in the memory of a runtime.

    Returns:
        ``(points,)`` bool, True for non-dominated points.
    """
    front = np.zeros(len(cost), dtype=bool)
    if len(further) == 1:
        front[_three(cost, size, further[0])] = True
        return front
    if further:
        return _all_pairs(np.stack([cost, size, *further]))
    order = np.lexsort((np.arange(len(cost)), cost, size))
    ordered = cost[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    front[order[ordered < before]] = True
    return front


def _all_pairs(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The front of ``(measures, points)`` by comparing each point with all others."""
    count = points.shape[1]
    front = np.ones(count, dtype=bool)
    for index in range(count):
        own = points[:, index : index + 1]
        no_larger = (points <= own).all(0)
        equal = (points == own).all(0)
        front[index] = not (no_larger & ~equal).any() and not equal[:index].any()
    return front


def _three(
    cost: NDArray[np.float64], size: NDArray[np.int64], load: NDArray[np.float64] | NDArray[np.int64]
) -> list[int]:
    """Indices of the non-dominated points in three measures.

    In the order of (size, load, cost) a point can only be dominated by, or equal to, an earlier one whose load and cost
    are no larger. The front of the earlier points in (load, cost) suffices: a staircase of rising loads, falling costs.
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
        while end < len(loads) and costs[end] >= own:  # steps that the point dominates
            end += 1
        loads[start:end], costs[start:end] = [at], [own]
    return kept
