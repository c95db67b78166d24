"""Weights and activations in one program: against trying everything, and its two budgets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mlorq.activations.compute import checked_compute, parse_compute
from mlorq.allocation.joint import Group, allocate_jointly, operations_of, weight_load
from mlorq.allocation.program import Choices
from mlorq.errors import BudgetError, ConfigError
from mlorq.forms.base import Candidate
from mlorq.models.layers import Layer


def problem(seed: int) -> tuple[list[Choices], list[np.ndarray], list[Group], list[int]]:
    """Three layers, of which two read one tensor, and a product."""
    draw = np.random.default_rng(seed)
    choices, loads = [], []
    for index in range(3):
        bits = np.sort(draw.choice(np.arange(2, 9), 4, replace=False))[::-1]
        cost = np.sort(draw.random(4)) * 0.1
        choices.append(Choices(f"layer{index}", cost, (bits * draw.integers(90, 110, 4)).astype(np.int64)))
        loads.append(bits * draw.uniform(900, 1100, 4))
    widths = np.array([4, 6, 8])
    groups = [
        Group(name, widths, np.sort(draw.random(3))[::-1] * 0.1, widths**2 * own)
        for name, own in (("a", 0.0), ("b", 0.0), ("product", 50.0))
    ]
    return choices, loads, groups, [0, 0, 1]


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_it_is_the_best_of_all(seed, solver):
    choices, loads, groups, group_of = problem(seed)
    most = sum(int(layer.size.max()) for layer in choices)
    picked_all = list(itertools.product(range(4), repeat=3))
    widths_all = list(itertools.product(range(3), repeat=3))
    largest = max(operations_of(loads, groups, group_of, p, w) for p in picked_all for w in widths_all)
    for memory, compute in ((0.6, 0.4), (0.8, 0.3), (1.0, 1.0)):
        limit, operations = int(memory * most), compute * largest
        best = min(
            (
                sum(layer.cost[row] for layer, row in zip(choices, picked, strict=True))
                + sum(group.cost[place] for group, place in zip(groups, widths, strict=True))
                for picked in picked_all
                for widths in widths_all
                if sum(layer.size[row] for layer, row in zip(choices, picked, strict=True)) <= limit
                and operations_of(loads, groups, group_of, picked, widths) <= operations
            ),
            default=None,
        )
        if best is None:
            with pytest.raises(BudgetError):
                allocate_jointly(choices, loads, groups, group_of, limit, operations, solver=solver)
            continue
        picked, widths, report = allocate_jointly(
            choices, loads, groups, group_of, limit, operations, solver=solver, gap=0.0
        )
        assert sum(int(layer.size[row]) for layer, row in zip(choices, picked, strict=True)) <= limit
        assert operations_of(loads, groups, group_of, picked, widths) <= operations * (1 + 1e-9)
        assert report.objective == pytest.approx(best, rel=1e-6)


def test_budgets_that_cannot_be_met_are_named(seed):
    choices, loads, groups, group_of = problem(seed)
    with pytest.raises(BudgetError, match="smallest possible is"):
        allocate_jointly(choices, loads, groups, group_of, 10, 1e12)
    with pytest.raises(BudgetError, match="least possible is"):
        allocate_jointly(choices, loads, groups, group_of, 10**9, 10.0)


def test_loads_count_what_is_multiplied():
    layer = Layer("l", "linear", 20, 30, 1, 7 * 600, 0, 0, 0)
    assert weight_load(layer, Candidate("Q", bits=3)) == 7 * 600 * 3
    low_rank = Candidate("LR", bits_a=4, bits_b=6, rank=5)
    assert weight_load(layer, low_rank) == 7 * (20 * 5 * 4 + 5 * 30 * 6)
    both = Candidate("QLR", bits=2, bits_a=4, bits_b=6, rank=5)
    assert weight_load(layer, both) == 7 * 600 * 2 + weight_load(layer, low_rank)


@pytest.mark.parametrize(
    ("text", "expected"), [("4x8", 4 * 8 * 100 + 64 * 10), ("3.5x4", 1400 + 160), ("20G", 2e10), ("1.5 Tbops", 1.5e12)]
)
def test_compute_budgets(text, expected):
    assert checked_compute(text) == text
    assert parse_compute(text, 100, 10) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["four", "4by4", "-3G", "0"])
def test_nonsense_is_no_compute_budget(text):
    with pytest.raises(ConfigError, match=rf"activations\.compute: '{text}' .*4x4.*20G"):
        parse_compute(text, 100, 10)
    with pytest.raises(ValueError, match=text):
        checked_compute(text)
