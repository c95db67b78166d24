"""Whole allocations: measured like a model in which everything is replaced, and improved where layers interact."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from mlorq.allocation.choices import Choices
from mlorq.allocation.program import Program
from mlorq.allocation.program import solve as solve_program
from mlorq.allocation.refinement import TIE, Measured, WholeModel, largest_uniform, preferred, refine
from mlorq.evaluation.outputs import output_nmse
from mlorq.models.layers import find_layers
from tests.nets import SkipNet, TokenNet, images, token_net


@pytest.mark.parametrize("kind", [TokenNet, SkipNet])
def test_costs_are_those_of_a_model_with_the_weights_replaced(kind, seed):
    model = token_net(seed, kind)
    batches = [images(5, seed), images(3, seed + 1)]
    found = find_layers(model, batches[0])
    torch.manual_seed(seed)
    weights = {}
    for layer in found.layers:
        weight = model.module.get_submodule(layer.name).weight
        weights[layer.name] = (weight + 0.1 * weight.std() * torch.randn_like(weight)).reshape(layer.out_features, -1)

    def naive(left_out: str | None) -> float:
        module = deepcopy(model.module)
        for name, weight in weights.items():
            if name != left_out:
                parameter = module.get_submodule(name).weight
                parameter.copy_(weight.reshape(parameter.shape))
        outputs, references = (
            torch.cat([model.outputs(net, batch) for batch in batches]) for net in (module, model.module)
        )
        return output_nmse(outputs, references)

    whole = WholeModel(model, found.blocks, batches)
    for layer in found.layers:
        whole.set(layer, weights[layer.name])
    with torch.no_grad():
        assert whole.cost() == pytest.approx(naive(None), rel=1e-4)
        expected = [naive(layer.name) for layer in found.layers]
    found_costs = [whole.cost() - gain for gain in whole.contributions(found.layers, weights)]
    assert found_costs == pytest.approx(expected, rel=1e-4)
    assert whole.cost() == pytest.approx(naive(None), rel=1e-4)  # everything is back


def interacting(seed: int, layers: int = 5, widths: tuple[int, ...] = (2, 3, 4)):
    """Layers whose errors add up alone, and are amplified by factors of their own together."""
    rng = np.random.default_rng(seed)
    alone = rng.uniform(0.5, 2.0, layers)
    together = alone * rng.choice([0.4, 2.5], layers)
    rows = [[{"form": "Q", "bits": bits, "bytes": 100 * bits} for bits in widths] for _ in range(layers)]
    cost = [np.array([scale * 4.0**-bits for bits in widths]) for scale in alone]
    true = [np.array([scale * 4.0**-bits for bits in widths]) for scale in together]
    size = np.array([100 * bits for bits in widths], dtype=np.int64)
    choices = [Choices(str(index), values, size) for index, values in enumerate(cost)]
    return choices, rows, true


def refined(seed: int, rounds: int):
    choices, rows, true = interacting(seed)
    limit = 1500

    def measure(picked):
        return float(sum(values[index] for values, index in zip(true, picked, strict=True)))

    def contributions(picked):
        return [float(values[index]) for values, index in zip(true, picked, strict=True)]

    def solve(costs):
        return solve_program(Program(costs, limit), gap=0.0).picked

    start = solve(choices)
    found = refine(choices, rows, limit, start, solve, measure, contributions, rounds)
    fitting = [picked for picked in product(range(3), repeat=5) if 100 * sum(picked) + 5 * 200 <= limit]
    return found, measure(start), min(map(measure, fitting))


def test_what_is_kept_is_the_best_that_was_measured_or_as_good_as_that(seed):
    improved, gaps = 0, []
    for index in range(60):
        found, first, least = refined(seed + index, 3)
        best = min(one.measured for one in found)
        assert best <= found[0].measured <= best * (1 + TIE)
        assert [one.measured for one in found[1:]] == sorted(one.measured for one in found[1:])
        assert all(found[0].measured <= one.measured for one in found if one.origin.startswith("uniform"))
        assert all(one.bytes <= 1500 for one in found)
        assert {"program"} <= {one.origin for one in found}
        assert least * (1 - 1e-9) <= found[0].measured <= first
        assert len({one.picked for one in found}) == len(found)
        improved += found[0].measured < first * (1 - 1e-9)
        gaps.append((first - least, found[0].measured - least))
    assert improved > 15
    before, after = np.sum(gaps, axis=0)
    assert after < 0.5 * before  # of what the program alone gives away


def measured(origin: str, predicted: float, cost: float) -> Measured:
    return Measured(origin, (), predicted, cost, 1)


def test_of_allocations_that_tie_the_one_predicted_best_is_kept_whichever_was_measured_lower():
    program, power = measured("program", 0.228, 0.2500), measured("power 1.5", 0.230, 0.2480)
    for noise in (0.985, 1.0, 1.015):
        assert preferred([program, replace(power, measured=power.measured * noise)]) is program
    clear = replace(power, measured=program.measured / (1 + TIE) * 0.999)
    assert preferred([program, clear]) is clear
    between = measured("round 1", 0.229, clear.measured * (1 + TIE / 2))
    assert preferred([program, clear, between]) is between


def test_a_tie_with_the_uniform_allocation_is_none():
    program, uniform = measured("program", 0.1, 0.2001), measured("uniform 3 bit", 0.3, 0.2)
    assert preferred([program, uniform]) is uniform
    assert preferred([replace(program, measured=0.2), uniform]).origin == "program"
    other = measured("codes alone", 0.2, 0.199)
    assert preferred([program, uniform, other]) is other


def test_noise_of_a_hundredth_changes_no_choice(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        predicted = np.sort(rng.uniform(1.0, 1.2, 6))
        costs = rng.uniform(1.0, 1.02, 6)  # together with the noise at most 1.02 · 1.01 / 0.99
        uniform = measured("uniform 3 bit", 1.5, 1.1)
        kept = [
            preferred(
                [*(measured(str(at), *pair) for at, pair in enumerate(zip(predicted, noisy, strict=True))), uniform]
            )
            for noisy in costs * rng.uniform(0.99, 1.01, (5, 6))
        ]
        assert [one.origin for one in kept] == ["0"] * 5


def test_without_rounds_the_uniform_allocation_is_still_compared(seed):
    for index in range(12):
        found, first, _ = refined(seed + index, 0)
        origins = {one.origin for one in found}
        assert origins <= {"program", "uniform 3 bit"}
        assert found[0].measured <= first


def test_programs_without_low_rank_and_with_large_costs_shunned_are_measured_too():
    low_rank = {"form": "LR", "bits": None}
    rows = [[{"form": "Q", "bits": bits, "bytes": 100 * bits} for bits in (2, 3, 4)] + [low_rank | {"bytes": 150}]] * 3
    size = np.array([200, 300, 400, 150], dtype=np.int64)
    # Alone the low rank of the first layer costs next to nothing, and together it costs a lot.
    choices = [Choices(str(index), np.array([0.4, 0.1, 0.02, 0.01 if index == 0 else 9.0]), size) for index in range(3)]
    seen = []

    def measure(picked):
        seen.append(tuple(picked))
        return sum(float(layer.cost[index]) for layer, index in zip(choices, picked, strict=True)) + (picked[0] == 3)

    def solve(costs):
        return solve_program(Program(costs, 900), gap=0.0).picked

    start = solve(choices)
    assert start[0] == 3
    found = refine(choices, rows, 900, start, solve, measure, lambda picked: [0.1] * 3, 1)
    assert found[0].picked == (1, 1, 1)
    assert {"program", "uniform 3 bit"} <= {one.origin for one in found}
    assert len(seen) == len(set(seen)) == len(found)  # none twice


def test_the_largest_uniform_allocation_that_fits():
    rows = [
        [{"form": "Q", "bits": bits, "bytes": 10 * bits} for bits in (2, 3, 4)]
        + [{"form": "LR", "bits": None, "bytes": 1}],
        [{"form": "Q", "bits": bits, "bytes": 20 * bits} for bits in (2, 4)],
    ]
    assert largest_uniform(rows, 200) == (4, (2, 1))
    assert largest_uniform(rows, 119) == (3, (1, 0))  # the second layer has no 3 bit: the nearest, and smaller
    assert largest_uniform(rows, 69) == (2, (0, 0))
    assert largest_uniform(rows, 59) is None


def test_layers_of_fixed_width_keep_it_in_uniform_allocations():
    def layer(*widths: int) -> list[dict]:
        return [{"form": "Q", "bits": bits, "bytes": 10 * bits} for bits in widths]

    rows = [layer(8), layer(2, 3, 4), layer(2, 3, 4)]
    assert largest_uniform(rows, 1000) == (4, (0, 2, 2))  # and not 8 bit, which two of three layers do not have
    assert largest_uniform(rows, 159) == (3, (0, 1, 1))
    assert largest_uniform(rows, 120) == (2, (0, 0, 0))
    assert largest_uniform(rows, 119) is None
