"""The smallest model that keeps a metric: what may be asked for, the bisection, and the Python function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mlorq
from mlorq.allocation.choices import Choices, SearchSpace
from mlorq.errors import BudgetError, ConfigError
from steps.smallest import STEPS_PER_BIT, Bisection, Keep

VALUES = {"accuracy": 0.8, "top5": 0.95, "perplexity": 20.0}


@pytest.mark.parametrize(
    ("asked", "name", "value"),
    [
        ({"max_drop": "1%"}, "accuracy", 0.792),
        ({"max_drop": " 0.01 "}, "accuracy", 0.79),
        ({"max_drop": 0.01}, "accuracy", 0.79),
        ({"max_drop": "0%"}, "accuracy", 0.8),
        ({"max_drop": "5%", "metric": "perplexity"}, "perplexity", 21.0),
        ({"min_metric": 0.7}, "accuracy", 0.7),
        ({"min_metric": 0.9, "metric": "top5"}, "top5", 0.9),
        ({"max_metric": 25, "metric": "perplexity"}, "perplexity", 25.0),
    ],
)
def test_bounds(asked: dict[str, Any], name: str, value: float) -> None:
    bound = Keep(**asked).bound("accuracy", VALUES)
    assert (bound.metric, bound.larger_is_better) == (name, name != "perplexity")
    assert math.isclose(bound.value, value)
    assert bound.is_kept(VALUES[name])
    assert not bound.is_kept(math.nan)
    worse = value - 1e-6 if bound.larger_is_better else value + 1e-6
    assert not bound.is_kept(worse)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "none is given"),
        ({"metric": "accuracy"}, "none is given"),
        ({"max_drop": "1%", "min_metric": 0.5}, "given: max_drop, min_metric"),
        ({"max_drop": "one"}, "max_drop: expected"),
        ({"max_drop": "-1%"}, "max_drop: expected"),
        ({"max_drop": "nan"}, "max_drop: expected"),
        ({"max_drop": True}, "max_drop: expected"),
        ({"min_metric": "0.8"}, "min_metric: expected a number"),
        ({"min_metric": math.inf}, "min_metric: expected a number"),
        ({"min_metric": True}, "min_metric: expected a number"),
        ({"max_drop": "1%", "metric": ""}, "metric: expected the name"),
        ({"max_drop": "1%", "metric": "acc"}, "metric 'acc' is unknown; the evaluation data has: accuracy, top5"),
        ({"min_metric": 0.9}, "accuracy of at least 0.9 is asked for, but the float model has 0.8"),
        (
            {"max_metric": 10, "metric": "perplexity"},
            "perplexity of at most 10 is asked for, but the float model has 20",
        ),
        ({"min_metric": 10, "metric": "perplexity"}, "smaller is better for perplexity"),
    ],
)
def test_what_cannot_be_asked_is_one_line(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Keep(**asked).bound("accuracy", VALUES)
    assert message in str(error.value)


def test_a_metric_is_needed() -> None:
    with pytest.raises(ConfigError, match="has no metric to keep"):
        Keep("1%").bound(None, {})
    with pytest.raises(ConfigError, match="the float model has nan"):
        Keep("1%").bound(None, {"accuracy": math.nan})
    assert Keep.of({"max_drop": None, "budget": "3bit"}) is None


def space(layers: int, weights: int) -> tuple[SearchSpace, int]:
    """Layers with candidates of 2 to 8 bits, of which more than 6 cost no less."""
    bits = np.array([2, 3, 4, 6, 8])
    cost = np.array([1.0, 0.3, 0.1, 0.01, 0.01])
    own = [Choices(f"layer{index}", cost, bits * weights // 8) for index in range(layers)]
    return SearchSpace(own, {}), layers * weights


@settings(max_examples=60, deadline=None)
@given(threshold=st.integers(1, 10 * STEPS_PER_BIT))
def test_bisection_finds_the_smallest_of_all_budgets(threshold: int) -> None:
    """Against a metric that is kept from some budget on."""
    bisection = Bisection(Keep(min_metric=0.5))
    bisection.measured({"name": "accuracy", "metrics": {"accuracy": 1.0}})
    bisection.searched(*space(3, 4096))
    while (budget := bisection.next()) is not None:
        bits = float(budget.value)
        assert 2 <= bits <= 6
        bisection.evaluated(budget, {"accuracy": 0.9 if bits * STEPS_PER_BIT >= threshold else 0.1})
    assert len(bisection.tried) <= 7
    least, largest = 2 * STEPS_PER_BIT, 6 * STEPS_PER_BIT
    if threshold > largest:
        assert bisection.found is None
        with pytest.raises(BudgetError, match="no budget up to 6bit gives accuracy of at least 0"):
            bisection.check_found()
    else:
        found = bisection.tried[bisection.check_found()].budget
        assert float(found.value) * STEPS_PER_BIT == max(threshold, least)
        assert str(found) == found.text or len(found.text) > 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def test_in_python() -> None:
    model, x = net(), torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    wanted = model(x).argmax(1)

    def agreement(module: nn.Module) -> dict[str, float]:
        return {"agreement": (module(x).argmax(1) == wanted).float().mean().item()}

    settings: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"forms": ["Q"]}}
    result = mlorq.compress(model, list(x.split(64)), max_drop="5%", evaluate=agreement, **settings)
    smallest = result.metrics["smallest"]
    assert smallest["float"] == 1.0
    assert smallest["bound"] == 0.95
    kept = [row for row in smallest["tried"] if row["kept"]]
    assert smallest["found"]["bytes"] == min(row["bytes"] for row in kept) == result.metrics["bytes"]
    assert agreement(result.model)["agreement"] == smallest["found"]["value"] >= 0.95
    lost = [row for row in smallest["tried"] if not row["kept"]]
    assert lost, "the bound is not kept at every size"
    assert max(row["bytes"] for row in lost) <= smallest["found"]["bytes"]
    assert {row["value"] >= 0.95 for row in lost} == {False}
    with pytest.raises(ConfigError, match="leave out budget"):
        mlorq.compress(model, [x], budget="3bit", max_drop="1%", evaluate=agreement)
    with pytest.raises(ConfigError, match="give evaluate"):
        mlorq.compress(model, [x], max_drop="1%")
    with pytest.raises(ConfigError, match="metric 'accuracy' is unknown; the evaluation data has: agreement"):
        mlorq.compress(model, [x], max_drop="1%", metric="accuracy", evaluate=agreement, **settings)
