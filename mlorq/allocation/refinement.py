"""Interaction between layers: whole allocations are measured, and programs are solved again around them (METHOD 7).

The integer program adds up what each layer costs alone. Together the layers cost more than that, the more the larger
single errors are, and a program picks the candidates whose costs came out too low. So several allocations are measured
on the whole model: the program's, the best uniform one within the budget, the program's without low rank, and those of
programs that shun large single costs, ``min Σ cost^p``. Around the best of them, S, the cost of a layer's candidates is
scaled by how much more the chosen one costs in S than alone,

    cost_ℓc ← cost_ℓc · √((F(S) - F(S with layer ℓ float)) / cost_ℓ,S(ℓ)),

F the measured cost of the whole model; the root, as half of what is seen is how this one rounding happens to correlate
with the others. The program under these costs gives the next allocation.

The best by measurement is kept. Nearly equal ones are a tie, or each machine would keep another: the last bits of its
products flip codes, which moves what an allocation costs by up to a hundredth or two. Of those within ``TIE`` of the
best, and no worse than the uniform one, the one with the least predicted cost is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlorq.activations.plan import ActivationPlan
from mlorq.allocation.choices import Choices
from mlorq.costs.output_cost import CostName, OutputCost
from mlorq.forms.base import FORMS, uniform_form
from mlorq.models.base import FloatModel, move_batch
from mlorq.models.layers import Layer
from mlorq.models.partial_forward import Segments, enters_cleanly

LARGEST_CORRECTION = 2.0  # of a layer's costs, either way: a marginal cost near zero is noise
POWERS = (1.5, 2.0, 3.0)  # of costs, in programs that shun large ones
UNIFORM = "uniform"  # how the origin of the best uniform allocation begins
TIE = 0.05  # of the least measured cost


class WholeModel:
    """Measures what the model's output costs with many layers changed at once.

    Args:
        model: the float model; it is copied.
        blocks: names of its blocks.
        batches: samples to measure on.
        device: where to run.
        cost: which cost of the output.
        labels: for cost ``task``.
        activations: quantized in whatever is measured; None: in none.
    """

    def __init__(
        self,
        model: FloatModel,
        blocks: Sequence[str],
        batches: Sequence[Any],
        device: torch.device | str = "cpu",
        *,
        cost: CostName = "nmse",
        labels: Sequence[Tensor] | None = None,
        activations: ActivationPlan | None = None,
    ) -> None:
        self.module = deepcopy(model.module)
        self._float = dict(model.module.named_parameters())
        self._segments = Segments(model, self.module, blocks)
        self._batches = [move_batch(batch, device, model.dtype) for batch in batches]
        references = self._outputs(0, [None] * len(self._batches))
        self._cost = OutputCost(cost, references, labels)
        if activations is not None:
            activations.install(self.module)
            references = self._outputs(0, [None] * len(self._batches))
        carry = self._segments.advance(self._batches[0], 0, None, len(blocks))
        self._chain = enters_cleanly(self._segments, self._batches[0], len(blocks), carry, references[0])

    def _outputs(self, start: int, carries: Sequence[Any]) -> list[Tensor]:
        pairs = zip(self._batches, carries, strict=True)
        return [self._segments.outputs(batch, start, carry) for batch, carry in pairs]

    def set(self, layer: Layer, weight: Tensor | None) -> None:
        """Put a weight ``(out_features, in_features)`` in the place of a layer's; None: the float one."""
        parameter = self.module.get_submodule(layer.name).weight
        assert isinstance(parameter, Tensor)
        found = self._float[f"{layer.name}.weight"] if weight is None else weight
        with torch.no_grad():
            parameter.copy_(found.reshape(parameter.shape))

    def cost(self) -> float:
        """Of the model as it is."""
        return self._cost(self._outputs(0, [None] * len(self._batches)))

    def contributions(
        self,
        layers: Sequence[Layer],
        weights: Mapping[str, Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """What the model costs more than with one layer at a time float again; a block's layers share what is before.

        Args:
            layers: in execution order.
            weights: of all of them, by name; what the model has now.
            progress: called with the layers done.
        """
        found = []
        whole = self.cost()
        at, carries = 0, [None] * len(self._batches)
        for index, layer in enumerate(layers):
            if self._chain and layer.block > at:
                pairs = zip(self._batches, carries, strict=True)
                carries = [self._segments.advance(batch, at, carry, layer.block) for batch, carry in pairs]
                at = layer.block
            self.set(layer, None)
            found.append(whole - self._cost(self._outputs(at, carries)))
            self.set(layer, weights[layer.name])
            if progress is not None:
                progress(index + 1)
        return found


@dataclass(frozen=True)
class Measured:
    """One allocation that was measured.

    Attributes:
        origin: ``program``, ``uniform 3 bit``, ``codes alone``, ``power 2`` …, or ``round 1`` ….
        picked: index of each layer's candidate.
        predicted: summed cost of its layers alone.
        measured: cost of the whole model.
        bytes: of its layers.
    """

    origin: str
    picked: tuple[int, ...]
    predicted: float
    measured: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("origin", "predicted", "measured", "bytes")}


def largest_uniform(rows: Sequence[Sequence[Mapping[str, Any]]], limit: int) -> tuple[int, tuple[int, ...]] | None:
    """``(bits, candidates)`` of the largest uniform quantization within the budget; None where none fits.

    A layer that is not offered a bit-width, because its settings fix others, takes the nearest that it has, the smaller
    of two.

    Args:
        rows: the candidates of every layer.
        limit: most bytes.
    """
    uniform = uniform_form().name
    by_bits = [{row["bits"]: index for index, row in enumerate(layer) if row["form"] == uniform} for layer in rows]
    distinct: dict[tuple[int, ...], int] = {}
    for bits in sorted(set().union(*by_bits)):
        picked = tuple(places[min((abs(width - bits), width) for width in places)[1]] for places in by_bits)
        distinct.setdefault(picked, int(bits))  # beyond the widest of most layers nothing changes: no name of its own
    for picked, bits in reversed(distinct.items()):
        if sum(layer[index]["bytes"] for layer, index in zip(rows, picked, strict=True)) <= limit:
            return bits, picked
    return None


def preferred(found: Sequence[Measured]) -> Measured:
    """The allocation to keep: of those that tie for the least measured cost the one with the least predicted cost.

    Both are costs of the whole model's output, in the units of ``search.cost`` (METHOD 7, interaction between layers).

    Args:
        found: at least one; where the uniform one is among them, none that measured worse is kept.

    Raises:
        ValueError: there is none.
    """
    least = min(one.measured for one in found)
    limits = [one.measured for one in found if one.origin.startswith(UNIFORM)]
    limit = min([least * (1 + TIE), *limits])
    return min((one for one in found if one.measured <= limit), key=lambda one: (one.predicted, one.measured))


def refine(
    choices: Sequence[Choices],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    limit: int,
    start: Sequence[int],
    solve: Callable[[Sequence[Choices]], Sequence[int]],
    measure: Callable[[Sequence[int]], float],
    contributions: Callable[[Sequence[int]], Sequence[float]],
    rounds: int,
) -> list[Measured]:
    """Measure allocations and look for better ones.

    Args:
        choices: the layers and their candidates.
        rows: the candidates' rows.
        limit: most bytes.
        start: the program's solution.
        solve: the program's solution under other costs.
        measure: cost of the whole model under an allocation.
        contributions: what the whole model costs more under an allocation than with one layer at a time float.
        rounds: most programs to solve around what was measured; 0: none of the other programs either.

    Returns:
        What was measured: the allocation to keep (``preferred``), then the others by their measured cost.
    """

    def measured(origin: str, picked: Sequence[int]) -> Measured:
        pairs = list(zip(choices, picked, strict=True))
        predicted = float(sum(layer.cost[index] for layer, index in pairs))
        size = int(sum(layer.size[index] for layer, index in pairs))
        return Measured(origin, tuple(picked), predicted, measure(picked), size)

    found = [measured("program", start)]
    known = {found[0].picked}

    def look_at(origin: str, picked: Sequence[int]) -> bool:
        """Measure an allocation that was not seen yet; whether it is the best so far."""
        if tuple(picked) in known:
            return False
        known.add(tuple(picked))
        found.append(measured(origin, picked))
        return found[-1].measured < min(one.measured for one in found[:-1])

    uniform = largest_uniform(rows, limit)
    if uniform is not None:
        look_at(f"{UNIFORM} {uniform[0]} bit", uniform[1])
    if all(len(layer.cost) == 1 for layer in choices):
        rounds = 0  # there is nothing to choose
    if rounds:
        look_at("codes alone", _codes_alone(choices, rows, limit, solve))
        for power in POWERS:
            look_at(f"power {power:g}", solve(_powers(choices, start, power)))
    for index in range(rounds):
        best = min(found, key=lambda one: one.measured)
        if not look_at(f"round {index + 1}", solve(_around(choices, best, contributions(best.picked)))):
            break  # the next round would start from the same allocation
    kept = preferred(found)
    return sorted(found, key=lambda one: (one is not kept, one.measured))


def _codes_alone(
    choices: Sequence[Choices],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    limit: int,
    solve: Callable[[Sequence[Choices]], Sequence[int]],
) -> list[int]:
    """The program's solution without low rank; with all forms where codes alone do not fit."""
    kept = [[index for index, row in enumerate(layer) if not FORMS[row["form"]].has_product] for layer in rows]
    if sum(int(layer.size[part].min()) for layer, part in zip(choices, kept, strict=True)) > limit:
        return list(solve(choices))
    part = [layer.only(own) for layer, own in zip(choices, kept, strict=True)]
    return [own[index] for own, index in zip(kept, solve(part), strict=True)]


def _powers(choices: Sequence[Choices], start: Sequence[int], power: float) -> list[Choices]:
    """Costs to a power, relative to the mean cost of a layer in an allocation."""
    mean = max(float(np.mean([layer.cost[index] for layer, index in zip(choices, start, strict=True)])), 1e-30)
    return [replace(layer, cost=(layer.cost / mean) ** power) for layer in choices]


def _around(choices: Sequence[Choices], at: Measured, contributions: Sequence[float]) -> list[Choices]:
    """Costs scaled to what the layers cost in an allocation."""
    corrected = []
    for layer, index, together in zip(choices, at.picked, contributions, strict=True):
        alone = float(layer.cost[index])
        factor = float(np.sqrt(max(together, 0.0) / alone)) if alone > 0 else 1.0
        factor = float(np.clip(factor, 1 / LARGEST_CORRECTION, LARGEST_CORRECTION))
        corrected.append(replace(layer, cost=layer.cost * factor))
    return corrected
