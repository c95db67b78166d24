"""The smallest model that keeps a metric: bisection over budgets on one search.

Budgets are multiples of 1/16 bit per weight, from the smallest possible size to that of the best candidates. Each is
one integer program, a rounding and an evaluation. With a grid of ``n`` budgets at most ``log2(n) + 1`` of them are
tried, some seven, always the same ones: what an interrupted run has computed is found in the store. The bisection takes
the metric for monotone in size. If it is not, the found budget keeps the metric, and the next smaller one does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mlorq.allocation.choices import smallest_bytes
from mlorq.config.budget import Budget, parse_budget
from mlorq.data.metrics import DEPTH_ERROR, PERPLEXITY, WORD_ERRORS
from mlorq.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from mlorq.allocation.choices import SearchSpace

STEPS_PER_BIT = 16
SMALLER_IS_BETTER = frozenset({PERPLEXITY, WORD_ERRORS, DEPTH_ERROR})


@dataclass(frozen=True)
class Bound:
    """The value of a metric that a model must keep.

    Attributes:
        metric: its name.
        reference: value of the float model.
        value: the worst value that is allowed.
        larger_is_better: whether the metric must be at least the value; else at most.
    """

    metric: str
    reference: float
    value: float
    larger_is_better: bool

    def is_kept(self, found: float) -> bool:
        """Whether a model with this metric is good enough; NaN is not."""
        return found >= self.value if self.larger_is_better else found <= self.value


@dataclass(frozen=True)
class Keep:
    """What is asked for: exactly one of the three, and the metric that it is about.

    Attributes:
        max_drop: how much worse than the float model's the metric may be: ``"1%"`` of it, or a difference, ``"0.01"``.
        min_metric: the metric must be at least this.
        max_metric: the metric must be at most this.
        metric: its name; None: the main metric of the evaluation data.
    """

    max_drop: str | float | None = None
    min_metric: float | None = None
    max_metric: float | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: none or several are given, or one is not a number in its range.
        """
        given = [name for name in ("max_drop", "min_metric", "max_metric") if getattr(self, name) is not None]
        if len(given) != 1:
            found = "none is given" if not given else f"given: {', '.join(given)}"
            raise ConfigError(f"give one of max_drop, min_metric and max_metric ({found})")
        if self.max_drop is not None:
            self._drop(1.0)
        else:
            value = getattr(self, given[0])
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{given[0]}: expected a number (given: {value!r:.60})")
        if self.metric is not None and (not isinstance(self.metric, str) or not self.metric):
            raise ConfigError(f"metric: expected the name of a metric (given: {self.metric!r:.60})")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Keep | None:
        """From parameters of these names; None if none of them is given.

        Raises:
            ConfigError: see the class; or a metric is named alone.
        """
        given = {name: values.get(name) for name in cls.__dataclass_fields__}
        return cls(**given) if any(value is not None for value in given.values()) else None

    def __str__(self) -> str:
        asked = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"{asked[0]} {asked[1]}" + (f" of {self.metric}" if self.metric else "")

    def _drop(self, reference: float) -> float:
        """The allowed difference to the float model's value.

        Raises:
            ConfigError: it is not a number, or negative.
        """
        text = str(self.max_drop).strip()
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if isinstance(self.max_drop, bool) or not 0 <= value < math.inf:
            raise ConfigError(f"max_drop: expected a part of the float model's metric, 1%, or a difference, 0.01 "
                              f"(given: {self.max_drop!r:.60})")  # fmt: skip
        return abs(reference) * value / 100 if text.endswith("%") else value

    def bound(self, main: str | None, values: Mapping[str, float]) -> Bound:
        """The bound on a model's metric.

        Args:
            main: name of the main metric; None: the first.
            values: metrics of the float model.

        Raises:
            ConfigError: there is no such metric, it is not finite, or more is asked for than the float model has.
        """
        if not values:
            raise ConfigError("the evaluation data has no metric to keep: give labels, or an evaluation function")
        name = self.metric or main or next(iter(values))
        if name not in values:
            raise ConfigError(f"metric {name!r} is unknown; the evaluation data has: {', '.join(values)}")
        reference = values[name]
        if not math.isfinite(reference):
            raise ConfigError(f"metric {name}: the float model has {reference}, from which no bound can be derived")
        if self.max_drop is not None:
            larger, drop = name not in SMALLER_IS_BETTER, self._drop(reference)
            return Bound(name, reference, reference - drop if larger else reference + drop, larger)
        if self.min_metric is not None:
            found = Bound(name, reference, float(self.min_metric), True)
            if name in SMALLER_IS_BETTER:
                raise ConfigError(f"min_metric: smaller is better for {name}; use max_metric")
        else:
            assert self.max_metric is not None
            found = Bound(name, reference, float(self.max_metric), False)
        if not found.is_kept(reference):
            asked = "at least" if found.larger_is_better else "at most"
            raise ConfigError(
                f"{name} of {asked} {found.value:g} is asked for, but the float model has {reference:.6g}"
            )
        return found


@dataclass(frozen=True)
class Tried:
    """A budget with the metric that it gave."""

    budget: Budget
    value: float
    is_kept: bool


@dataclass
class Bisection:
    """The budgets to try, one after another.

    Attributes:
        keep: what is asked for.
        bound: on the metric; None before the float model is measured.
        tried: budgets so far.
    """

    keep: Keep
    bound: Bound | None = None
    tried: list[Tried] = field(default_factory=list)
    _below: int = 0  # the largest budget that is known or taken to be too small, in steps
    _above: int = 0  # the smallest that is known to keep the metric; at first one more than the largest
    _largest: int = 0

    def __str__(self) -> str:
        return str(self.keep)

    def measured(self, info: Mapping[str, Any]) -> None:
        """Take the ``metrics.json`` of the float model.

        Raises:
            ConfigError: see ``Keep.bound``.
        """
        self.bound = self.keep.bound(info["name"], info["metrics"])

    def searched(self, space: SearchSpace, params: int) -> None:
        """Take the result of the search.

        Args:
            space: all candidates with their costs.
            params: number of weights.
        """

        def steps(size: int) -> int:
            return max(1, math.ceil(Fraction(8 * STEPS_PER_BIT * size, params)))

        self._below = steps(smallest_bytes(space.choices)) - 1
        # Above the size of the candidates of least cost, budgets change nothing.
        best = sum(int(own.size[own.cost == own.cost.min()].min()) for own in space.choices)
        self._largest = min(max(steps(best), self._below + 1), 32 * STEPS_PER_BIT)
        self._above = self._largest + 1

    def next(self) -> Budget | None:
        """The next budget to try; None if the smallest is found, or if the largest does not keep the metric."""
        if self._above - self._below < 2:
            return None
        return _budget((self._below + self._above) // 2)

    def evaluated(self, budget: Budget, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the model at the budget that ``next`` gave."""
        assert self.bound is not None
        value = metrics.get(self.bound.metric, math.nan)
        kept = self.bound.is_kept(value)
        self.tried.append(Tried(budget, value, kept))
        middle = (self._below + self._above) // 2
        if kept:
            self._above = middle
        else:
            self._below = middle

    @property
    def found(self) -> int | None:
        """Index of the smallest tried budget that keeps the metric; None if none does."""
        kept = [index for index, one in enumerate(self.tried) if one.is_kept]
        return min(kept, key=lambda index: self.tried[index].budget.value, default=None)

    def check_found(self) -> int:
        """The index of the smallest budget.

        Raises:
            BudgetError: none keeps the metric.
        """
        index, bound = self.found, self.bound
        assert bound is not None
        if index is None:
            last = max(self.tried, key=lambda one: one.budget.value)
            asked = "at least" if bound.larger_is_better else "at most"
            raise BudgetError(
                f"no budget up to {last.budget} gives {bound.metric} of {asked} {bound.value:.6g}: there it is "
                f"{last.value:.6g}, and {bound.reference:.6g} for the float model; allow more, or use more rounding"
            )
        return index

    def to_json(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The account of a finished bisection.

        Args:
            results: result objects, one per tried budget, in their order.
        """
        assert self.bound is not None
        index = self.found
        rows = [
            {"budget": one.budget.text, "run": result["run"], "bytes": result["bytes"], "value": one.value}
            | {"kept": one.is_kept}
            for one, result in zip(self.tried, results, strict=True)
        ]
        found = {} if index is None else {name: rows[index][name] for name in ("run", "budget", "bytes", "value")}
        return {
            "asked": str(self.keep),
            "metric": self.bound.metric,
            "float": self.bound.reference,
            "bound": self.bound.value,
            "larger_is_better": self.bound.larger_is_better,
            "found": found or None,
            "tried": rows,
        }


def _budget(steps: int) -> Budget:
    return parse_budget(f"{steps / STEPS_PER_BIT:g}bit")
