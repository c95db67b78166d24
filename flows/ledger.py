"""The steps of a run with their outcomes, and the account of each result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlorq.artifacts.store import ArtifactRef
from steps.allocations import Compressed
from steps.base import Outcome, StepSpec, seconds_by_step


@dataclass(frozen=True)
class Account:
    """The steps behind one result.

    Attributes:
        computed: number of steps computed for it in this run.
        reused: number of steps whose artifacts existed already.
        seconds: time that the computed steps took, by step name.
        seconds_reused: time that the reused steps took when they were computed, by step name.
        reused_by_step: number of reused steps by step name.
    """

    computed: int
    reused: int
    seconds: dict[str, float]
    seconds_reused: dict[str, float]
    reused_by_step: dict[str, int]

    @property
    def steps(self) -> dict[str, int]:
        """``{"computed": n, "reused": n}``."""
        return {"computed": self.computed, "reused": self.reused}


@dataclass
class Ledger:
    """Every step of a run by key, with its first outcome."""

    specs: dict[str, StepSpec] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def add(self, spec: StepSpec, outcome: Outcome) -> None:
        """Record a step's outcome."""
        self.specs.setdefault(spec.key, spec)
        self.outcomes.setdefault(spec.key, outcome)

    @property
    def steps(self) -> dict[str, int]:
        """Steps of the whole run, ``{"computed": n, "reused": n}``."""
        reused = sum(outcome.reused for outcome in self.outcomes.values())
        return {"computed": len(self.outcomes) - reused, "reused": reused}

    def accounts(self, results: Sequence[ArtifactRef]) -> list[Account]:
        """One account per result, in order; a step that two results share counts as computed for the first only."""
        seen: set[str] = set()
        accounts = []
        for result in results:
            keys = self._behind(result)
            computed = [key for key in keys if not self.outcomes[key].reused and key not in seen]
            seen.update(keys)
            made = set(computed)
            reused = [key for key in keys if key not in made]
            times = (
                seconds_by_step(self.outcomes[key] for key in computed),
                seconds_by_step(self.outcomes[key] for key in reused),
            )
            counts = Counter(self.specs[key].step for key in reused)
            accounts.append(Account(len(computed), len(reused), *times, dict(counts)))
        return accounts

    def _behind(self, result: ArtifactRef) -> list[str]:
        """Keys of a result and of all artifacts that it depends on, in the order of the run."""
        found: set[str] = set()
        waiting = [result.key]
        while waiting:
            key = waiting.pop()
            if key in found or key not in self.specs:
                continue
            found.add(key)
            waiting += [ref.key for ref in self.specs[key].artifacts]
        return [key for key in self.specs if key in found]


def results_json(
    ledger: Ledger, results: Sequence[Compressed], started: float, as_json: Callable[[Compressed], dict[str, Any]]
) -> dict[str, Any]:
    """The return value of a flow: ``results``, one public object per budget, ``steps`` and ``wall_seconds`` of the run.

    Args:
        ledger: of the run.
        results: one per budget.
        started: time at which the run began, by ``time.perf_counter``.
        as_json: gives the public object of a result.
    """
    accounts = ledger.accounts([result.summary or result.allocation for result in results])
    objects = []
    for result, account in zip(results, accounts, strict=True):
        times = {"seconds": account.seconds, "seconds_reused": account.seconds_reused}
        objects.append(as_json(result) | {"steps": account.steps} | times)
    return {"results": objects, "steps": ledger.steps, "wall_seconds": round(time.perf_counter() - started, 3)}
