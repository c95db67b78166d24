"""Global costs as local costs times a factor that is measured at a few candidates (METHOD 7, ``sensitivity: auto``).

In the metric of second moments, the ratio of global to local cost varies slowly along a form's front. It is measured at
both ends of the front and in the middle; a half is measured in its own middle if the last middle was mispredicted from
its ends, and so on. A regular layer takes three measurements per form, others up to the given maximum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa

from mlorq.costs.measured import LayerProbe, dense_of, sensitivity_table
from mlorq.fitting.base import LayerFit
from mlorq.forms.base import FORMS

TINY = np.finfo(float).tiny


def scaled_closed_form(local: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Global costs from local ones, times a factor that is known at the measured points.

    The factor, global over local cost, is interpolated linearly in logarithms between measured neighbours, and constant
    beyond them.

    Args:
        local: ``(points,)`` local costs of one form of one layer.
        known: indices of the measured points.
        values: their global costs, positive.

    Returns:
        ``(points,)`` global costs.
    """
    logs = np.log(np.maximum(local, TINY))
    order = np.argsort(logs[known], kind="stable")
    at, factor = logs[known][order], np.log(np.maximum(values, TINY))[order] - logs[known][order]
    scaled: np.ndarray = np.exp(np.minimum(logs + np.interp(logs, at, factor), 700.0))
    return scaled


def measure_where_needed(
    local: np.ndarray, measure: Callable[[int], float], points: int, tolerance: float
) -> dict[int, float]:
    """Global costs of adaptively chosen points of a front.

    Args:
        local: ``(front,)`` local costs in descending order.
        measure: gives the global cost of a point, by index.
        points: largest number of points to measure, at least two.
        tolerance: halves are measured further if a cost was mispredicted by more than this, in natural logarithms.

    Returns:
        ``{index: cost}``.
    """
    last = len(local) - 1
    cost = {index: measure(index) for index in sorted({0, last})}
    logs = np.log(np.maximum(local, TINY))
    halves = deque([(0, last)])
    while halves and len(cost) < points:
        left, right = halves.popleft()
        if right - left < 2:
            continue
        middle = left + 1 + int(np.argmin(np.abs(logs[left + 1 : right] - (logs[left] + logs[right]) / 2)))
        ends = np.array([left, right])
        expected = scaled_closed_form(local, ends, np.array([cost[left], cost[right]]))[middle]
        cost[middle] = measure(middle)
        if abs(np.log(max(cost[middle], TINY) / max(expected, TINY))) > tolerance:
            halves += [(left, middle), (middle, right)]
    return cost


def scaled_sensitivity(
    probe: LayerProbe,
    fit: LayerFit,
    table: pa.Table,
    *,
    points: int = 5,
    tolerance: float = 0.2,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Global costs of all candidates on a layer's front (``schemas.SENSITIVITY``; METHOD 7).

    Args:
        probe: measures the layer.
        fit: fit of the layer's candidates.
        table: the layer's candidates (``schemas.CANDIDATES``).
        points: largest number of candidates measured per form; 1: the middle one.
        tolerance: as for ``measure_where_needed``.
        progress: called with (candidates measured or spared, most candidates to measure).
    """
    rows = table.to_pylist()
    local = table["local_cost"].to_numpy()
    groups = _form_rows(table, table["bytes"].to_numpy())
    most = sum(min(points, len(group)) for group in groups)
    cost: dict[int, float] = {}
    measured: set[int] = set()

    def measure(row: int) -> float:
        value = probe.cost(dense_of(fit, rows[row]))
        measured.add(row)
        if progress is not None:
            progress(min(spared + len(measured), most), most)
        return value

    spared = 0  # measurements that were not needed
    for group in groups:
        before = len(measured)
        if points == 1:
            middle = len(group) // 2
            found = {middle: measure(int(group[middle]))}
        else:
            found = measure_where_needed(local[group], partial(_at, measure, group), points, tolerance)
        # A cost of 0 (the task's loss fell) gives no factor: use the other points; without any, all costs are 0.
        known = np.array([index for index in sorted(found) if found[index] > 0], dtype=int)
        values = np.array([found[index] for index in known.tolist()])
        scaled = scaled_closed_form(local[group], known, values) if len(known) else np.zeros(len(group))
        cost |= {int(row): found.get(index, float(scaled[index])) for index, row in enumerate(group)}
        spared += min(points, len(group)) - (len(measured) - before)
    if progress is not None:
        progress(most, most)
    how = {row: "measured" if row in measured else "closed_form" for row in cost}
    return sensitivity_table(table, cost, how)


def _at(measure: Callable[[int], float], rows: np.ndarray, index: int) -> float:
    return measure(int(rows[index]))


def _form_rows(table: pa.Table, size: np.ndarray) -> list[np.ndarray]:
    """Rows on the front of each form, in ascending order of bytes."""
    form = np.array(table["form"].to_pylist())
    front = table["on_front"].to_numpy()
    found = [np.flatnonzero((form == one.name) & front) for one in FORMS]
    return [rows[np.argsort(size[rows], kind="stable")] for rows in found if len(rows)]
