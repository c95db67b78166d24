"""What a run did: every step with its outcome, and what of it each result stands on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlorq.artifacts.store import ArtifactRef
from steps.base import Outcome, StepSpec


@dataclass(frozen=True)
class Account:
    """What one result cost.

    Attributes:
        computed: steps computed for it in this run.
        reused: steps it stands on that were there already.
        seconds: by step name, what the artifacts took when they were made, now or earlier.
    """

    computed: int
    reused: int
    seconds: dict[str, float]

    @property
    def steps(self) -> dict[str, int]:
        """``{"computed": n, "reused": n}``."""
        return {"computed": self.computed, "reused": self.reused}


@dataclass
class Ledger:
    """Every step of a run by key; the first outcome of a key counts."""

    specs: dict[str, StepSpec] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def add(self, spec: StepSpec, outcome: Outcome) -> None:
        """Note a step's outcome."""
        self.specs.setdefault(spec.key, spec)
        self.outcomes.setdefault(spec.key, outcome)

    @property
    def steps(self) -> dict[str, int]:
        """Steps of the whole run, ``{"computed": n, "reused": n}``."""
        reused = sum(outcome.reused for outcome in self.outcomes.values())
        return {"computed": len(self.outcomes) - reused, "reused": reused}

    def accounts(self, results: Sequence[ArtifactRef]) -> list[Account]:
        """One account a result, in order: what two results share is computed for the first and reused for the next."""
        seen: set[str] = set()
        accounts = []
        for result in results:
            keys = self._behind(result)
            computed = [key for key in keys if not self.outcomes[key].reused and key not in seen]
            seen.update(keys)
            seconds: dict[str, float] = defaultdict(float)
            for key in keys:
                seconds[self.specs[key].step] += self.outcomes[key].seconds
            rounded = {step: round(value, 3) for step, value in seconds.items()}
            accounts.append(Account(len(computed), len(keys) - len(computed), rounded))
        return accounts

    def _behind(self, result: ArtifactRef) -> list[str]:
        """Keys of a result and of all it was made from, in the order of the run."""
        found: set[str] = set()
        waiting = [result.key]
        while waiting:
            key = waiting.pop()
            if key in found or key not in self.specs:
                continue
            found.add(key)
            waiting += [ref.key for ref in self.specs[key].artifacts]
        return [key for key in self.specs if key in found]
