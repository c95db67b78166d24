"""Interaction between layers: allocations are measured on the whole model and refined (METHOD 7, ``search.rounds``).

The integer program sums the costs of single layers. Layers together cost more, the more the larger single errors are,
and the program prefers candidates whose costs were underestimated. So several allocations are measured on the whole
model: the program's, the best uniform one within the budget, the program's without low rank, and those of programs that
penalise large single costs, ``min Σ cost^p``. Around the best of them, S, each layer's costs are scaled by the ratio of
the chosen candidate's cost in S to its cost alone,

    cost_ℓc ← cost_ℓc · √((F(S) - F(S with layer ℓ float)) / cost_ℓ,S(ℓ)),

where F is the measured cost of the whole model. The square root accounts for chance: about half of the ratio is due to
the correlation of this particular rounding with the others. The program under these costs gives the next allocation.

The allocation of least measured cost is kept, up to ties: the last bits of matrix products differ between machines and
flip codes, which changes the cost of an allocation by 1 or 2 %. Among the allocations within ``TIE`` of the best and no
worse than the uniform one, the one of least predicted cost is kept.
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
from mlorq.models.layer_list import Layer
from mlorq.models.partial_forward import Segments, enters_cleanly

LARGEST_CORRECTION = 2.0  # largest factor on a layer's costs, up or down: a marginal cost near zero is noise
POWERS = (1.5, 2.0, 3.0)  # exponents of costs in programs that penalise large ones
UNIFORM = "uniform"  # prefix of the origin of the best uniform allocation
TIE = 0.05  # relative to the least measured cost


class WholeModel:
    """Measures the cost of the model's output with many layers changed at once.

    Args:
        model: the float model; it is copied.
        blocks: names of its blocks.
        batches: samples to measure on.
        device: device of the model.
        cost: which cost of the output.
        labels: labels of the samples, one tensor per batch, for cost ``task``.
        activations: activations to quantize in all measurements; None: none.
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
        """Set a layer's weight, ``(out_features, in_features)``; None restores the float weight."""
        parameter = self.module.get_submodule(layer.name).weight
        assert isinstance(parameter, Tensor)
        found = self._float[f"{layer.name}.weight"] if weight is None else weight
        with torch.no_grad():
            parameter.copy_(found.reshape(parameter.shape))

    def cost(self) -> float:
        """Cost of the model with its current weights."""
        return self._cost(self._outputs(0, [None] * len(self._batches)))

    def contributions(
        self,
        layers: Sequence[Layer],
        weights: Mapping[str, Tensor],
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Leave-one-out costs: the cost of the model minus its cost with one layer float, for each layer.

        Layers of one block share the forward pass through the blocks before it.

        Args:
            layers: the layers, in execution order.
            weights: their current weights, by name.
            progress: called with the number of layers done.
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
    """One measured allocation.

    Attributes:
        origin: ``program``, ``uniform 3 bit``, ``codes alone``, ``power 2`` …, or ``round 1`` ….
        picked: index of each layer's candidate.
        predicted: sum of the costs of single layers.
        measured: cost of the whole model.
        bytes: bytes of its layers.
    """

    origin: str
    picked: tuple[int, ...]
    predicted: float
    measured: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("origin", "predicted", "measured", "bytes")}


def largest_uniform(rows: Sequence[Sequence[Mapping[str, Any]]], limit: int) -> tuple[int, tuple[int, ...]] | None:
    """``(bits, candidates)`` of the largest uniform quantization within the budget; None if none fits.

    A layer whose settings exclude a bit-width takes the nearest that it has, the smaller of two.

    Args:
        rows: candidate rows of every layer.
        limit: the budget in bytes.
    """
    uniform = uniform_form().name
    by_bits = [{row["bits"]: index for index, row in enumerate(layer) if row["form"] == uniform} for layer in rows]
    distinct: dict[tuple[int, ...], int] = {}
    for bits in sorted(set().union(*by_bits)):
        picked = tuple(places[min((abs(width - bits), width) for width in places)[1]] for places in by_bits)
        distinct.setdefault(picked, int(bits))  # equal allocations keep the smallest bit-width
    for picked, bits in reversed(distinct.items()):
        if sum(layer[index]["bytes"] for layer, index in zip(rows, picked, strict=True)) <= limit:
            return bits, picked
    return None


def preferred(found: Sequence[Measured]) -> Measured:
    """The allocation to keep: the least predicted cost among those that tie for the least measured cost.

    Both are costs of the whole model's output, in the units of ``search.cost`` (METHOD 7, ``search.rounds``).

    Args:
        found: at least one allocation; none that measured worse than a uniform one is kept.

    Raises:
        ValueError: ``found`` is empty.
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
    """Measure allocations, and refine the best by programs around it (METHOD 7, ``search.rounds``).

    Args:
        choices: the layers and their candidates.
        rows: candidate rows of every layer.
        limit: the budget in bytes.
        start: the program's solution.
        solve: gives the program's solution under other costs.
        measure: gives the cost of the whole model under an allocation.
        contributions: gives the leave-one-out costs of the layers under an allocation (``WholeModel.contributions``).
        rounds: largest number of programs around the best allocation; 0: measure the start and the uniform one alone.

    Returns:
        The measured allocations: the one to keep (``preferred``), then the others in order of measured cost.
    """

    def measured(origin: str, picked: Sequence[int]) -> Measured:
        pairs = list(zip(choices, picked, strict=True))
        predicted = float(sum(layer.cost[index] for layer, index in pairs))
        size = int(sum(layer.size[index] for layer, index in pairs))
        return Measured(origin, tuple(picked), predicted, measure(picked), size)

    found = [measured("program", start)]
    known = {found[0].picked}

    def measure_new(origin: str, picked: Sequence[int]) -> bool:
        """Measure an allocation unless it is known; whether it is new and the best so far."""
        if tuple(picked) in known:
            return False
        known.add(tuple(picked))
        found.append(measured(origin, picked))
        return found[-1].measured < min(one.measured for one in found[:-1])

    uniform = largest_uniform(rows, limit)
    if uniform is not None:
        measure_new(f"{UNIFORM} {uniform[0]} bit", uniform[1])
    if all(len(layer.cost) == 1 for layer in choices):
        rounds = 0  # no alternatives
    if rounds:
        measure_new("codes alone", _codes_alone(choices, rows, limit, solve))
        for power in POWERS:
            measure_new(f"power {power:g}", solve(_powers(choices, start, power)))
    for index in range(rounds):
        best = min(found, key=lambda one: one.measured)
        if not measure_new(f"round {index + 1}", solve(_around(choices, best, contributions(best.picked)))):
            break  # the next round would start from the same allocation
    kept = preferred(found)
    return sorted(found, key=lambda one: (one is not kept, one.measured))


def _codes_alone(
    choices: Sequence[Choices],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    limit: int,
    solve: Callable[[Sequence[Choices]], Sequence[int]],
) -> list[int]:
    """The program's solution without low rank; with all forms if codes alone exceed the budget."""
    kept = [[index for index, row in enumerate(layer) if not FORMS[row["form"]].has_product] for layer in rows]
    if sum(int(layer.size[part].min()) for layer, part in zip(choices, kept, strict=True)) > limit:
        return list(solve(choices))
    part = [layer.only(own) for layer, own in zip(choices, kept, strict=True)]
    return [own[index] for own, index in zip(kept, solve(part), strict=True)]


def _powers(choices: Sequence[Choices], start: Sequence[int], power: float) -> list[Choices]:
    """Costs raised to a power, relative to the mean cost of a layer in an allocation."""
    mean = max(float(np.mean([layer.cost[index] for layer, index in zip(choices, start, strict=True)])), 1e-30)
    return [replace(layer, cost=(layer.cost / mean) ** power) for layer in choices]


def _around(choices: Sequence[Choices], at: Measured, contributions: Sequence[float]) -> list[Choices]:
    """Costs scaled by the square root of cost within an allocation over cost alone, per layer."""
    corrected = []
    for layer, index, together in zip(choices, at.picked, contributions, strict=True):
        alone = float(layer.cost[index])
        factor = float(np.sqrt(max(together, 0.0) / alone)) if alone > 0 else 1.0
        factor = float(np.clip(factor, 1 / LARGEST_CORRECTION, LARGEST_CORRECTION))
        corrected.append(replace(layer, cost=layer.cost * factor))
    return corrected
