"""Global costs to first order in the change of a layer's weight, corrected by a few measurements (METHOD 5).

With J the Jacobian of f with respect to the layer's outputs ``y_t = W x_t``, a change ΔW moves f of a sample by
``δ = Σ_t J_t ΔW x_t + O(ΔW²)``, and the NMSE is ``Σ_samples ‖δ‖² / Σ_samples ‖f‖²``. A backward pass from a vector v
gives ``g_t = J_tᵀ v`` of a whole batch, hence ``v · δ = Σ_t g_t · ΔW x_t`` of every candidate: a matrix product, where
a measurement takes a forward pass of the model.

With ``M = Σ_t g_t x_tᵀ`` that is ``⟨ΔW, M⟩``. All ranks of a pair of factors share B and the product ``M Bᵀ``; each
has ``⟨A_r B_r, M⟩ = ⟨A_r, (M Bᵀ)_r⟩``. On a curve with more than ``RANKS`` candidates, the costs of so many, evenly
spaced, are computed; between them they are interpolated, linearly in the logarithms.

``‖δ‖²`` is estimated by ``C/V Σ_i (v_i · δ)²`` with V random orthonormal vectors of a sample's C outputs, the same ones
for all candidates. Its relative variance is ``2 (C - V) / (V (C + 2))`` for one sample, and with S samples of like cost
that over S. For V = C it is exact.

The estimates of one form are then multiplied by the ratio of measured to estimated cost, interpolated linearly in the
logarithms between the measured candidates and constant below them. Measured are the candidate with the largest error,
where the first order is least sure; in forms with factors, whose errors are larger, or if its ratio is not within
``TOLERANCE``, also the middle one; and then, as long as the ratios of neighbours differ by more than ``TOLERANCE``, one
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mlorq.artifacts.schemas import FIRST_ORDER
from mlorq.costs.local import spread
from mlorq.costs.measured import LayerProbe, curves, dense_of, measured_sensitivity, sensitivity_table
from mlorq.fitting.base import LayerFit
from mlorq.forms.base import FORMS, Candidate
from mlorq.models.batches import batch_samples
from mlorq.models.unfolding import input_tokens, output_tokens

VECTORS = 128  # of all samples together, at least, unless the outputs are fewer
TOLERANCE = 2.0  # ratio of the corrections of neighbouring measured candidates up to which none between is measured
CHUNK_ELEMENTS = 1 << 23  # entries of one temporary: bounds memory
RANKS = 16  # candidates of a curve of factors whose costs are computed
LEAST_RATIO = 1e-6  # of a measured to an estimated cost: logarithms need a positive number

Costs = NDArray[np.float64]


class Change(NamedTuple):
    """Changes ΔW of a candidate, or of several candidates of a curve.

    Attributes:
        rows: the candidates' rows in the layer's table.
        difference: ΔW of the last candidate, ``(out_features, in_features)`` float32.
        a: ``(candidates, R, out_features)``: ``Aᵀ - A_lastᵀ`` of each, with zeros beyond its rank; None for one.
        b: ``(R, in_features)``, of all candidates.
    """

    rows: NDArray[np.int64]
    difference: Tensor
    a: Tensor | None = None
    b: Tensor | None = None


def first_order_sensitivity(
    probe: LayerProbe,
    fit: LayerFit,
    table: pa.Table,
    *,
    points: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Global costs of all candidates on a layer's front (``schemas.FIRST_ORDER``; METHOD 5).

    Costs other than the NMSE, and layers that no gradient reaches, are measured (``measured_sensitivity``).

    Args:
        probe: measures the layer.
        fit: fit of the layer's candidates.
        table: the layer's candidates (``schemas.CANDIDATES``).
        points: largest number of candidates measured per form; without first-order costs, per curve.
        seed: seed of the random vectors, which are drawn on the CPU.
        progress: called with (candidates measured, largest number of candidates to measure).
    """
    changes = changes_of(fit, table) if probe.cost_name == "nmse" else []
    found = first_order_costs(probe, changes, table.num_rows, seed=seed) if changes else None
    if found is None:
        costs = measured_sensitivity(probe, fit, table, points=points, progress=progress)
        return costs.append_column(FIRST_ORDER.field("first_order"), pa.nulls(len(costs), pa.float64()))
    rows = table.to_pylist()
    groups: dict[str, list[int]] = {}
    for curve in curves(table):
        fill(found, curve)
        groups.setdefault(rows[curve[0]]["form"], []).extend(curve.tolist())
    cost: dict[int, float] = {}
    how: dict[int, str] = {}
    most = sum(min(points, len(group)) for group in groups.values())

    def measure(row: int) -> float:
        value = probe.cost(dense_of(fit, rows[row]))
        how[row] = "measured"
        if progress is not None:
            progress(len(how), most)
        return value

    for form, group in groups.items():
        ordered = sorted(group, key=lambda row: float(found[row]))
        values = corrected(found[ordered], _of(ordered, measure), points, FORMS[form].has_product)
        cost |= zip(ordered, values, strict=True)
    how = {row: how.get(row, "first_order") for row in cost}
    costs = sensitivity_table(table, cost, how)
    return costs.append_column(FIRST_ORDER.field("first_order"), pa.array(found[sorted(cost)]))


def _of(ordered: Sequence[int], measure: Callable[[int], float]) -> Callable[[int], float]:
    return lambda place: measure(ordered[place])


def corrected(estimates: Costs, measure: Callable[[int], float], points: int, several: bool) -> list[float]:
    """Estimated costs times ratios of measured to estimated costs, which are interpolated between measured candidates.

    Args:
        estimates: of the candidates of one form, ascending.
        measure: measures the candidate at a place.
        points: largest number of measurements.
        several: whether two candidates are measured in any case.

    Returns:
        The costs; where one is measured, that.
    """
    first = int(np.searchsorted(estimates, 0.0, side="right"))  # candidates without an error cost nothing
    last = len(estimates) - 1
    ratios: dict[int, float] = {}

    def add(*places: int) -> None:
        for place in places:
            if place not in ratios and len(ratios) < points:
                ratios[place] = float(np.log(max(measure(place) / estimates[place], LEAST_RATIO)))

    if first > last:
        return [0.0] * len(estimates)
    add(last)
    if several or abs(ratios[last]) > np.log(TOLERANCE):
        add((first + last + 1) // 2)
    logarithms = np.log(estimates[first:])
    while len(ratios) < points:
        gaps = [
            (abs(ratios[left] - ratios[right]), left, right)
            for left, right in pairwise(sorted(ratios))
            if right > left + 1
        ]
        widest, left, right = max(gaps, default=(0.0, 0, 0))
        if not widest > np.log(TOLERANCE):
            break
        middle = (logarithms[left - first] + logarithms[right - first]) / 2
        between = np.abs(logarithms[left + 1 - first : right - first] - middle)
        add(left + 1 + int(between.argmin()))
    known = sorted(ratios)
    factors = np.interp(logarithms, logarithms[np.array(known) - first], [ratios[place] for place in known])
    return [0.0] * first + [float(value) for value in estimates[first:] * np.exp(factors)]


# -- first-order costs ------------------------------------------------------------------------------------------------


def changes_of(fit: LayerFit, table: pa.Table) -> list[Change]:
    """The changes of the candidates on a layer's front, or of ``RANKS`` on each curve of factors.

    Args:
        fit: fit of the layer's candidates.
        table: the layer's candidates (``schemas.CANDIDATES``).
    """
    rows = table.to_pylist()
    weight = fit.weight.float()
    found: list[Change] = []
    for curve in curves(table):
        some = curve[list(spread(len(curve), RANKS))]
        form = FORMS[rows[curve[0]]["form"]]
        factors = form.factors(fit, [Candidate.of_row(rows[row]) for row in some])
        if factors is None:
            found += [Change(np.array([row]), dense_of(fit, rows[row]).float() - weight) for row in curve]
            continue
        lefts, b = [left.float() for left in factors[0]], factors[1].float()
        a = torch.stack([F.pad(left, (0, len(b) - left.shape[1])).T for left in lefts]) - lefts[-1].T
        found.append(Change(some, lefts[-1] @ b - weight, a, b))
    return found


def fill(costs: Costs, curve: NDArray[np.int64]) -> None:
    """Costs of the candidates of a curve between those that were computed, in place.

    Args:
        costs: ``(rows of the layer's table,)``.
        curve: the candidates' rows, in ascending order of position.
    """
    known = list(spread(len(curve), RANKS))
    if len(known) < len(curve) and (costs[curve[known]] > 0).all():
        costs[curve] = np.exp(np.interp(np.arange(len(curve)), known, np.log(costs[curve[known]])))


def first_order_costs(
    probe: LayerProbe, changes: Sequence[Change], count: int, *, vectors: int = VECTORS, seed: int = 0
) -> Costs | None:
    """First-order NMSE of a layer's changes.

    Args:
        probe: of the layer, whose samples are used.
        changes: the changes.
        count: number of rows of the layer's table.
        vectors: random vectors of all samples together; the number per sample is rounded up, at least one and at most
            the number of outputs.
        seed: seed of the vectors.

    Returns:
        ``(count,)`` costs, 0 for rows without a change; None if no gradient reaches the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = sum(batch_samples(batch) for batch in probe.batches)
    total = np.zeros(count)
    reached = False
    for batch, calls, outputs in probe.recorded():
        own = batch_samples(batch)
        if not outputs.requires_grad or not calls:
            continue
        frames = orthonormal_vectors(len(outputs), outputs.shape[1], -(-vectors // samples), generator)
        inputs, gradients = _tokens(probe.layer, calls, outputs, frames.to(outputs.device), own)
        if gradients is None:
            continue
        reached = reached or bool(gradients.any())
        add_squares(total, changes, inputs, gradients, getattr(probe.layer, "groups", 1))
    if not reached or not np.isfinite(total).all() or probe.power == 0:
        return None
    return total / probe.power


def orthonormal_vectors(samples: int, outputs: int, count: int, generator: torch.Generator) -> Tensor:
    """V random orthonormal vectors of each sample's C outputs, times ``√(C/V)``: ``(V, samples, C)``.

    With V = C, the unit vectors.

    Args:
        samples: number of samples.
        outputs: C.
        count: V; C if it is larger.
        generator: draws them.
    """
    if count >= outputs:
        return torch.eye(outputs).unsqueeze(1).expand(outputs, samples, outputs)
    frames = torch.linalg.qr(torch.randn(samples, outputs, count, generator=generator)).Q
    scaled: Tensor = frames.permute(2, 0, 1) * (outputs / count) ** 0.5
    return scaled


def _tokens(
    layer: nn.Module, calls: Sequence[tuple[str, Tensor, Tensor]], outputs: Tensor, frames: Tensor, samples: int
) -> tuple[Tensor, Tensor | None]:
    """Of all calls: x, ``(samples, tokens, in_features)``, and g, ``(samples, V, tokens, out_features)``, or None."""
    passes = []
    places = [output for _, _, output in calls]
    for vector in frames:
        found = torch.autograd.grad(outputs, places, vector.contiguous(), retain_graph=True, allow_unused=True)
        passes.append([None if part is None else _wide(output_tokens(layer, part, samples)) for part in found])
    used = [index for index, part in enumerate(passes[0]) if part is not None]
    inputs = [_wide(input_tokens(layer, calls[index][1], samples)) for index in used]
    if not used:
        return outputs, None
    gradients = [torch.cat([part for part in parts if part is not None], dim=1) for parts in passes]
    return torch.cat(inputs, dim=1), torch.stack(gradients, dim=1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def add_squares(total: Costs, changes: Sequence[Change], inputs: Tensor, gradients: Tensor, groups: int = 1) -> None:
    """Add ``Σ_samples Σ_i (v_i · δ)²`` of each candidate to ``total``, in place.

    Args:
        total: ``(rows of the layer's table,)``.
        changes: the changes.
        inputs: x, ``(samples, tokens, groups · in_features)``.
        gradients: g, ``(samples, V, tokens, out_features)``.
        groups: convolution groups.
    """
    samples, count, tokens, width = gradients.shape
    ranks = [change.b.shape[0] for change in changes if change.b is not None]
    step = max(1, CHUNK_ELEMENTS // max(1, count * max(tokens, *ranks, 1) * width))
    for start in range(0, samples, step):
        x, g = inputs[start : start + step], gradients[start : start + step]
        for change in changes:
            moved = _products(change.difference.to(x.dtype), x, g, groups)  # (samples, V)
            if change.a is None or change.b is None:
                total[change.rows] += float(moved.square().sum())
                continue
            right = (x @ change.b.to(x.dtype).T).transpose(1, 2)  # (samples, R, tokens)
            product = (right.unsqueeze(1) @ g).flatten(2)  # (M Bᵀ)ᵀ, (samples, V, R · out_features)
            parts = product @ change.a.to(x.dtype).flatten(1).T  # (samples, V, candidates)
            total[change.rows] += (moved.unsqueeze(-1) + parts).square().sum((0, 1)).cpu().numpy()


def _products(difference: Tensor, inputs: Tensor, gradients: Tensor, groups: int) -> Tensor:
    """``Σ_t g_t · ΔW x_t``, ``(samples, V)`` float64."""
    columns = difference.shape[1]
    parts = [
        inputs[..., group * columns : (group + 1) * columns] @ rows.T
        for group, rows in enumerate(difference.chunk(groups))
    ]
    changed = torch.cat(parts, dim=-1) if groups > 1 else parts[0]  # (samples, tokens, out_features)
    found: Tensor = (gradients.flatten(2) @ changed.flatten(1).unsqueeze(-1)).squeeze(-1).double()
    return found
