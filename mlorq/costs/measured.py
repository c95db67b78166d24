"""Global costs: the error of the model's output with one layer alone compressed (METHOD 5).

The global cost of a candidate is the NMSE ``E‖f_ℓ(x) - f(x)‖² / E‖f(x)‖²`` over calibration samples, or another cost of
the output (``output_cost``). On every curve of a form (``Form.curve``: one bit-width, or the ranks of a pair of factor
bit-widths), a few points of the front, spread evenly by index, are measured; the others are interpolated linearly in
local cost between their two measured neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mlorq.artifacts.schemas import SENSITIVITY
from mlorq.calibration.label_free_hessian import Call, recorded_calls
from mlorq.costs.float_passes import FloatPasses
from mlorq.costs.local import spread
from mlorq.costs.output_cost import CostName, OutputCost
from mlorq.fitting.base import LayerFit
from mlorq.forms.base import FORMS, Candidate
from mlorq.models.base import FloatModel
from mlorq.models.batches import batch_samples
from mlorq.models.layer_list import Layer
from mlorq.models.layers import matrix_of, set_matrix


class LayerProbe:
    """Measures the cost of the output with one layer's weight replaced; runs the model from the changed block on.

    The blocks before the layer run once, at construction or for an earlier layer. As a context manager it restores the
    float weight on exit, also after an error.

    Args:
        model: the float model, on ``device``; its layer's weight is replaced in place.
        layer: the layer to replace.
        blocks: names of the model's blocks.
        batches: samples to measure on.
        device: device of the model.
        cost: which cost of the output.
        labels: labels of the samples, one tensor per batch, for cost ``task``.
        passes: the float model's passes on these samples, if they are kept for several layers.

    Raises:
        ModelError, DataError: see ``OutputCost``.
    """

    def __init__(
        self,
        model: FloatModel,
        layer: Layer,
        blocks: Sequence[str],
        batches: Sequence[Any],
        device: torch.device | str = "cpu",
        *,
        cost: CostName = "nmse",
        labels: Sequence[Tensor] | None = None,
        passes: FloatPasses | None = None,
    ) -> None:
        self.model = model
        self.record = layer
        self.layer = model.module.get_submodule(layer.name)
        self.original = matrix_of(self.layer).clone()
        passes = passes or FloatPasses(model, blocks, batches, device)
        self.segments, self.batches = passes.segments, passes.batches
        self.start, self.carries = passes.entry(layer.block)
        self.cost_name = cost
        self._output_cost = OutputCost(cost, passes.outputs, labels)

    def __enter__(self) -> LayerProbe:
        return self

    def __exit__(self, *_: object) -> None:
        set_matrix(self.layer, self.original)

    @property
    def power(self) -> float:
        """``Σ ‖f(x)‖²`` of the samples."""
        return self._output_cost.power

    def recorded(self) -> Iterator[tuple[Any, list[Call], Tensor]]:
        """Of each batch: the batch, the layer's calls with its float weight and f(x), within one autograd graph."""
        set_matrix(self.layer, self.original)
        for batch, carry in zip(self.batches, self.carries, strict=True):
            forward = partial(self.segments.differentiable_outputs, batch, self.start, carry)
            calls, outputs = recorded_calls(self.model, [self.record], forward)
            yield batch, calls, outputs

    def cost(self, weight: Tensor) -> float:
        """Cost of the output with the layer's weight replaced by ``weight``, ``(out_features, in_features)``."""
        set_matrix(self.layer, weight)
        pairs = zip(self.batches, self.carries, strict=True)
        return self._output_cost([self.segments.outputs(batch, self.start, carry) for batch, carry in pairs])


def spread_batches(batches: Sequence[Any], samples: int) -> list[Any]:
    """Enough batches for ``samples`` samples (all if there are fewer), spread evenly over the list.

    Batches of texts are ordered by length: the first ones would hold short texts only.
    """
    mean = sum(batch_samples(batch) for batch in batches) / len(batches)
    wanted = min(len(batches), max(1, round(samples / mean)))
    return [batches[int((index + 0.5) * len(batches) / wanted)] for index in range(wanted)]


def curves(table: pa.Table) -> list[np.ndarray]:
    """Rows on the front of each curve, in ascending order of position; forms in the order of the registry.

    Args:
        table: a layer's candidates (``schemas.CANDIDATES``).
    """
    found: dict[tuple[int, Hashable], list[tuple[int, int]]] = {}
    order = {form.name: index for index, form in enumerate(FORMS)}
    for row, (values, front) in enumerate(zip(table.to_pylist(), table["on_front"].to_pylist(), strict=True)):
        if front:
            candidate = Candidate.of_row(values)
            form = FORMS[candidate.form]
            curve = (order[form.name], form.curve(candidate))
            found.setdefault(curve, []).append((form.position(candidate), row))
    ordered = sorted(found.items(), key=lambda pair: pair[0][0])
    return [np.array([row for _, row in sorted(points)]) for _, points in ordered]


def measured_points(table: pa.Table, points: int) -> list[int]:
    """Rows of a candidate table that are measured: up to ``points`` on each curve's front."""
    return [int(rows[index]) for rows in curves(table) for index in spread(len(rows), points)]


def interpolate(local: np.ndarray, measured: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Global costs of points along a front, linear in local cost between measured neighbours.

    Args:
        local: ``(points,)`` local costs, in order of position.
        measured: ascending indices of the measured points, first and last included.
        values: their global costs.

    Returns:
        ``(points,)`` global costs; between neighbours of equal local cost, their mean.
    """
    result = np.empty(len(local))
    result[measured] = values
    for (left, right), (low, high) in zip(pairwise(measured), pairwise(values), strict=True):
        inside = slice(left + 1, right)
        width = local[right] - local[left]
        if width == 0:
            result[inside] = (low + high) / 2
        else:
            result[inside] = low + (high - low) * (local[inside] - local[left]) / width
    return result


def measured_sensitivity(
    probe: LayerProbe,
    fit: LayerFit,
    table: pa.Table,
    *,
    points: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Global costs of all candidates on a layer's front, measured or interpolated (``schemas.SENSITIVITY``; METHOD 5).

    Args:
        probe: measures the layer.
        fit: fit of the layer's candidates.
        table: the layer's candidates (``schemas.CANDIDATES``).
        points: largest number of candidates measured per curve.
        progress: called with (candidates measured, candidates to measure).
    """
    rows = table.to_pylist()
    chosen = measured_points(table, points)
    cost: dict[int, float] = {}
    for index, row in enumerate(chosen):
        cost[row] = probe.cost(dense_of(fit, rows[row]))
        if progress is not None:
            progress(index + 1, len(chosen))
    how = dict.fromkeys(chosen, "measured")
    local = table["local_cost"].to_numpy()
    for group in curves(table):
        known = np.array([index for index, row in enumerate(group) if int(row) in cost], dtype=int)
        values = np.array([cost[int(group[index])] for index in known])
        for row, value in zip(group, interpolate(local[group], known, values), strict=True):
            cost.setdefault(int(row), float(value))
            how.setdefault(int(row), "interpolated")
    return sensitivity_table(table, cost, how)


def dense_of(fit: LayerFit, row: Mapping[str, Any]) -> Tensor:
    """Ŵ of a row of a candidate table, ``(out_features, in_features)`` float32."""
    candidate = Candidate.of_row(row)
    return FORMS[candidate.form].dense(fit, candidate)


def local_sensitivity(table: pa.Table) -> pa.Table:
    """``schemas.SENSITIVITY`` of a front with local costs as global costs, without measurements (METHOD 7).

    Args:
        table: the layer's candidates.
    """
    rows = np.flatnonzero(table["on_front"].to_numpy()).tolist()
    local = table["local_cost"].to_numpy()
    return sensitivity_table(table, {row: float(local[row]) for row in rows}, dict.fromkeys(rows, "local"))


def sensitivity_table(table: pa.Table, cost: Mapping[int, float], how: Mapping[int, str]) -> pa.Table:
    """``schemas.SENSITIVITY`` of some rows of a candidate table.

    Args:
        table: the layer's candidates.
        cost: global cost by row.
        how: ``measured``, ``interpolated``, ``first_order``, ``closed_form`` or ``local``, by row.
    """
    names = table["candidate_id"].to_pylist()
    order = sorted(cost)
    return pa.table(
        {
            "candidate_id": [names[row] for row in order],
            "global_cost": [cost[row] for row in order],
            "how": [how[row] for row in order],
        },
        schema=SENSITIVITY,
    )
