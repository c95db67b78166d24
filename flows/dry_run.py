"""A dry run: the layers, the steps to compute and to reuse, the smallest size and the expected time. Writes nothing.

It runs the pipeline with an executor that looks steps up without running them: a key depends on the keys of the inputs,
not on their contents, so the steps after a missing one can still be looked up. The contents of only two steps determine
which steps follow: the layers, which are then discovered again, and an allocation, after which all steps count as
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.estimate import Estimate, measure_speed, memory_bytes
from mlorq.calibration.covariance import in_blocks
from mlorq.checkpoint.size_bound import table_bytes
from mlorq.codecs.base import Residency
from mlorq.config.budget import Budget
from mlorq.config.layer_overrides import layer_search
from mlorq.config.run import SearchConfig
from mlorq.errors import BudgetError
from mlorq.forms.base import Shape, Smallest, smallest_size
from mlorq.forms.embedding_tables import TableList, find_tables
from mlorq.memory import block_width
from mlorq.models.layer_list import Layer, LayerList, still_float
from mlorq.rounding import METHODS
from steps import activations, baseline, layers, pack
from steps.allocations import Least, allocation_step, check_budget, run_allocations
from steps.base import Outcome, StepSpec, find
from steps.candidates import residency_of
from steps.embeddings import are_chosen, fixed
from steps.pipeline import run_budget, run_search
from steps.reconstruct import members
from steps.session import Session
from steps.table_costs import WIDTHS

SEARCH = ("layers", "embeddings", "activations", "capture", "candidates", "sensitivity", "width_costs", "table_costs")
BY_BUDGET = ("embeddings", "round", "tune", "compressed", "evaluate", "calibration", "export", "summary")
BY_LAYER = ("candidates", "sensitivity", "round")
NOTE = "an estimate from one timed forward and one timed matrix product"
CLUSTER_NOTE = " here; the cluster's workers may differ"


def smallest_layer(layer: Layer, search: SearchConfig, residency: Residency | None = None) -> Smallest:
    """Bytes of a layer's smallest candidates.

    Args:
        layer: the layer.
        search: the ``search`` section of the run.
        residency: of the run's target.
    """
    own = layer_search(search, layer)
    shape = Shape(layer.out_features, layer.in_features, layer.groups)
    storage = replace(own.storage, residency=residency_of(layer, residency))
    return smallest_size(shape, own.form_settings, storage)


def least_of(session: Session, found: LayerList) -> Least:
    """The smallest sizes that the run's model can have."""
    config = session.config
    smallest = [smallest_layer(layer, config.search, config.residency) for layer in found.layers]
    memory = [own.memory for own in smallest if own.memory is not None]
    tables = 0
    if are_chosen(session):
        module, least_bits = session.model.module, min(WIDTHS)
        tables = sum(table_bytes(module, name, least_bits) for name in pack.tables(session))
    return Least(
        found.params,
        pack.rest_bytes_bound(session, found.layers),
        sum(own.bytes for own in smallest),
        pack.rest_memory(session, found.layers),
        None if config.target is None else sum(memory),
        tables,
    )


@dataclass
class Counts:
    """Steps of one kind: the number in the store, the number to compute, and the seconds that takes."""

    reused: int = 0
    compute: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"reused": self.reused, "compute": self.compute, "seconds": round(self.seconds, 1)}


class Planner:
    """Implements ``steps.pipeline.Executor``: looks every step up without running it.

    Args:
        session: of the run.
        found: the model's layers.
        estimate: of the time that a step takes.
    """

    def __init__(self, session: Session, found: LayerList, estimate: Estimate) -> None:
        self.session = session
        self.found = found
        self.estimate = estimate
        rounding = session.config.rounding
        tuning = METHODS[rounding.method].tuning
        optional: dict[str, Any] = {"tune": tuning is not None and tuning.steps(rounding)}
        optional["export"] = session.config.export
        optional["activations"] = session.config.activations is not None
        chosen = are_chosen(session)
        of_search = optional | {"embeddings": fixed(session) is not None, "table_costs": chosen}
        first = allocation_step(session)
        of_search["width_costs"] = first == "joint"
        self.search = [name for name in SEARCH if of_search.get(name, True)]
        rest = [name for name in BY_BUDGET if (optional | {"embeddings": chosen}).get(name, True)]
        self.by_budget = [first, *rest]
        self.counts: dict[str, Counts] = {name: Counts() for name in (*self.search, first, "baseline", *rest)}
        self._phase = ""
        self._seen: set[str] = set()

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """Announce the next phase: ``total`` steps of one kind."""
        self._phase = name

    def run(self, spec: StepSpec) -> Outcome:
        """Look one step up; each step is counted once."""
        outcome = find(spec, self.session.store)
        if spec.key not in self._seen:
            self._seen.add(spec.key)
            if outcome is not None:
                self.counts[self._phase].reused += 1
            elif self._phase == "export":
                self._count_export(str(spec.layer))
            else:
                self._count(self._phase, next((item for item in self.found.layers if item.name == spec.layer), None))
        return outcome or Outcome(spec.ref, False, 0.0)

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """Look steps up."""
        return [self.run(spec) for spec in specs]

    def count_all(self, *phases: str) -> None:
        """Count all steps of these phases as steps to compute."""
        for phase in phases:
            if phase == "export":
                for entry in self.session.config.export:
                    self._count_export(entry.to)
                continue
            for layer in self.found.layers if phase in BY_LAYER else (None,):
                self._count(phase, layer)
            if phase == "round" and METHODS[self.session.config.rounding.method].blocks is not None:
                for block in range(len(self.found.blocks)):
                    if members(self.found, block):
                        self._count(phase, None)

    def _count_export(self, target: str) -> None:
        self.counts["export"].compute += 1
        self.counts["export"].seconds += self.estimate.export_seconds(target)

    def _count(self, phase: str, layer: Layer | None) -> None:
        self.counts[phase].compute += 1
        self.counts[phase].seconds += self.estimate.seconds(phase, layer)


def make_plan(session: Session, found: LayerList, budgets: Sequence[Budget]) -> dict[str, Any]:
    """The report of ``mlorq compress --dry-run``, as JSON.

    Args:
        session: of the run.
        found: the model's layers (``flows.run.known_layers``).
        budgets: of the run.
    """
    least = least_of(session, found)
    rest, smallest = least.rest_bytes, least.bytes
    config = session.config
    sizes = {layer.name: smallest_layer(layer, config.search, config.residency).bytes for layer in found.layers}
    rows: list[dict[str, Any]] = []
    reached = []
    for budget in budgets:
        try:
            allowed = budget.compressible_bytes(found.params, rest)
        except BudgetError:  # the float rest of the model alone exceeds it
            allowed = None
        feasible = is_possible(budget, least)
        reached += [budget] if feasible else []
        rows.append({"budget": str(budget), "budget_bytes": allowed, "feasible": feasible})
    planner = Planner(session, found, Estimate(session, found, measure_speed(session)))
    _walk(planner, reached)
    return {
        "model": session.config.model.display_name,
        "device": session.device,
        "layers": [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "out_features": layer.out_features,
                "in_features": layer.in_features,
                "params": layer.params,
                "macs": layer.macs,
                "smallest_bytes": sizes[layer.name],
            }
            for layer in found.layers
        ],
        "blocks": _blocks(session, found),
        "embeddings": _embeddings(session),
        "skipped": [{"layer": one.name, "reason": one.reason, "bytes": one.bytes} for one in found.skipped],
        "others": _others(session, found),
        "params": found.params,
        "float_bytes": 4 * found.params,
        "rest_bytes": rest,
        "rest": pack.rest_kinds(session, found.layers),
        "smallest_bytes": smallest,
        "smallest_file_bytes": smallest + least.tables + rest,
        **_memory(session, least),
        "budgets": rows,
        "steps": {phase: counts.to_json() for phase, counts in planner.counts.items()},
        "expected": {
            "seconds": round(sum(counts.seconds for counts in planner.counts.values()), 1),
            "memory_bytes": memory_bytes(session, found),
            "note": NOTE + (CLUSTER_NOTE if session.config.engine.runner != "threads" else ""),
        },
    }


def is_possible(budget: Budget, least: Least) -> bool:
    """Whether a model can have a budget's size."""
    try:
        check_budget(budget, least)
    except BudgetError:
        return False
    return True


def _memory(session: Session, least: Least) -> dict[str, Any]:
    """The smallest memory that the model can have in the run's target; empty without one."""
    target = session.config.target
    if target is None or least.memory is None or least.rest_memory is None:
        return {}
    return {"target": target.text, "smallest_memory_bytes": least.memory + least.rest_memory}


def _blocks(session: Session, found: LayerList) -> list[dict[str, Any]]:
    """The layers whose second moments of inputs are blocks on the diagonal."""
    if session.config.search.metric != "moments":
        return []
    return [
        {"layer": layer.name, "in_features": layer.in_features, "width": block_width(layer.in_features)}
        for layer in found.layers
        if in_blocks(layer)
    ]


def _first_missing(session: Session) -> str | None:
    """The first missing step on whose artifact the keys of later steps depend; None if there is none."""
    listed = find(layers.spec(session), session.store)
    if listed is None:
        return "layers"
    if session.config.activations is not None and find(activations.spec(session, listed.ref), session.store) is None:
        return "activations"
    return None


def _tables(session: Session) -> TableList | None:
    """The embedding tables that a run would quantize, and those it would skip; None if tables stay float."""
    settings = session.config.embeddings
    return None if settings is None else find_tables(session.model.module, settings.smallest)


def _embeddings(session: Session) -> dict[str, Any] | None:
    """``_tables`` as JSON."""
    settings, found = session.config.embeddings, _tables(session)
    if settings is None or found is None:
        return None
    skipped = [{"table": name, "reason": reason} for name, reason in found.skipped]
    return {"bits": settings.bits, "tables": found.tables, "skipped": skipped}


def _others(session: Session, found: LayerList) -> list[dict[str, Any]]:
    """Weights of other modules that stay float."""
    tables = _tables(session) or TableList([], [])
    return [one._asdict() for one in still_float(found.others, tables.tables, dict(tables.skipped))]


def _walk(planner: Planner, budgets: Sequence[Budget]) -> None:
    session = planner.session
    planner.phase("baseline", 1)
    float_evaluation = planner.run(baseline.spec(session)).ref
    first_missing = _first_missing(session)
    if first_missing is not None:
        if first_missing == "activations":
            planner.phase("layers", 1)
            planner.run(layers.spec(session))
        planner.count_all(*planner.search[planner.search.index(first_missing) :])
        for _ in budgets:
            planner.count_all(*planner.by_budget)
        return
    search = run_search(session, planner)
    for budget in budgets:
        (result,) = run_allocations(session, planner, search, [budget])
        if session.store.exists(result.allocation):
            run_budget(session, planner, search, result, float_evaluation)
        else:
            planner.count_all(*[name for name in planner.by_budget if name != allocation_step(session)])
