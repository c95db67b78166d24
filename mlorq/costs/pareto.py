"""The Pareto front of cost against memory, by one sort and one running minimum."""

from __future__ import annotations

import numpy as np


def pareto_front(cost: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Mark the points that no other point beats: none is as small and cheaper, or as cheap and smaller.

    Of equal points the first is kept.

    Args:
        cost: ``(points,)``.
        size: ``(points,)``.

    Returns:
        ``(points,)`` bool.
    """
    order = np.lexsort((np.arange(len(cost)), cost, size))
    ordered = cost[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    front = np.zeros(len(cost), dtype=bool)
    front[order[ordered < before]] = True
    return front
