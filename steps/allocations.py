"""Allocations of a finished search: the integer program of every budget.

``steps.pipeline`` runs the search first; ``steps.search_index`` finds a finished one in the store. Nothing here imports
torch: with an index, allocations need neither the model nor the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlorq.allocation.choices import TableBudget, smallest_bytes, smallest_memory, smallest_tables
from mlorq.artifacts.store import ArtifactRef
from mlorq.config.budget import Budget
from mlorq.errors import BudgetError
from mlorq.models.layer_list import Layer
from mlorq.numbers import byte_count
from steps import allocate, joint, summary
from steps.allocate import TABLE_COSTS, Limits, Memory
from steps.base import Outcome, StepSpec
from steps.handles import ModelRef

if TYPE_CHECKING:
    from steps.artifacts import ArtifactReader
    from steps.session import Session


class Executor(Protocol):
    """Runs steps."""

    def run(self, spec: StepSpec) -> Outcome:
        """Run one step, or find its artifact."""

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """Run independent steps, in any order; results in the order given."""

    def phase(self, name: str, total: int, budget: str = "") -> None:
        """Announce the next phase: ``total`` steps of one kind, of one budget unless ``budget`` is empty."""


@dataclass
class Search:
    """Artifacts of the search, shared by all budgets.

    Attributes:
        layers_ref: the ``layers`` artifact.
        layers: the compressible layers in execution order.
        model: the float model that is compressed, with its LayerNorms folded if activations are quantized.
        capture: the ``capture`` artifact.
        rest_bytes: upper bound of the bytes of a checkpoint without its compressible layers' weights.
        rest_memory: bytes of the same in the memory of the runtime that the model is meant for; None without one.
        specs: the steps of the search, in their order.
        candidates: ``{layer: artifact}``.
        sensitivity: ``{layer: artifact}``.
        activations: the ``activations`` artifact; None if activations stay float.
        widths: the ``width_costs`` artifact; None if bit-widths of activations are not chosen.
        tables: the ``table_costs`` artifact; None if bit-widths of embedding tables are not chosen.
    """

    layers_ref: ArtifactRef
    layers: list[Layer]
    model: ModelRef
    capture: ArtifactRef
    rest_bytes: int
    rest_memory: int | None
    specs: list[StepSpec]
    candidates: dict[str, ArtifactRef] = field(default_factory=dict)
    sensitivity: dict[str, ArtifactRef] = field(default_factory=dict)
    activations: ArtifactRef | None = None
    widths: ArtifactRef | None = None
    tables: ArtifactRef | None = None

    @classmethod
    def of_specs(
        cls,
        specs: Sequence[StepSpec],
        model: str,
        rest_bytes: int,
        rest_memory: int | None,
        artifacts: ArtifactReader,
    ) -> Search:
        """The search whose steps these are.

        Args:
            specs: the steps of the search.
            model: key of the float model.
            rest_bytes, rest_memory: see the attributes.
            artifacts: reads the list of layers.

        Raises:
            KeyError: a step is missing.
            StoreError: the list of layers is not in the store.
        """
        single = {spec.step: spec.ref for spec in specs if spec.layer is None}
        by_layer: dict[str, dict[str, ArtifactRef]] = {"candidates": {}, "sensitivity": {}}
        for spec in specs:
            if spec.layer is not None:
                by_layer[spec.step][spec.layer] = spec.ref
        plan = single.get("activations")
        listed = artifacts.layers(single["layers"]).layers
        return cls(
            single["layers"],
            listed,
            ModelRef(model, plan),
            single["capture"],
            rest_bytes,
            rest_memory,
            list(specs),
            **by_layer,
            activations=plan,
            widths=single.get("width_costs"),
            tables=single.get("table_costs"),
        )

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.layers]

    @property
    def params(self) -> int:
        """Number of weights of all layers."""
        return sum(layer.params for layer in self.layers)

    def limit(self, budget: Budget) -> int:
        """Bytes that the weights of the layers may take.

        Raises:
            BudgetError: not even the float rest of the model fits.
        """
        return budget.compressible_bytes(self.params, self.rest_bytes)


@dataclass
class Compressed:
    """The artifacts of one budget; those after ``allocation`` are None if only the allocation is computed.

    Attributes:
        budget: the budget.
        model: the float model that is compressed; if bit-widths of activations are chosen, with those of this budget.
        allocation: the chosen candidate of every layer.
        exports: one artifact per entry of the configuration's ``export``.
    """

    budget: Budget
    model: ModelRef
    allocation: ArtifactRef
    checkpoint: ArtifactRef | None = None
    evaluation: ArtifactRef | None = None
    summary: ArtifactRef | None = None
    exports: list[ArtifactRef] = field(default_factory=list)


@dataclass
class Allocated:
    """The result of ``allocate_budgets``.

    Attributes:
        results: one per possible budget, in their order.
        impossible: the other budgets, each with the reason.
    """

    results: list[Compressed] = field(default_factory=list)
    impossible: list[tuple[Budget, BudgetError]] = field(default_factory=list)


@dataclass(frozen=True)
class Least:
    """The smallest sizes that a model can have.

    Attributes:
        params: number of weights of the compressible layers.
        rest_bytes: upper bound of the bytes of everything else in a checkpoint.
        bytes: of the compressible layers in a checkpoint.
        rest_memory: bytes of everything else in the memory of the runtime that the model is meant for; None without
            one.
        memory: bytes of the compressible layers there.
        tables: bytes of the embedding tables whose bit-widths are chosen.
    """

    params: int
    rest_bytes: int
    bytes: int
    rest_memory: int | None = None
    memory: int | None = None
    tables: int = 0


def check_budget(budget: Budget, least: Least) -> None:
    """Refuse a budget below the smallest possible size.

    Args:
        budget: the budget.
        least: the smallest possible sizes.

    Raises:
        BudgetError: the budget is too small; the message has the smallest possible size.
    """
    params, rest_bytes, smallest = least.params, least.rest_bytes, least.bytes
    held = budget.held_bytes(least.rest_memory)
    tables = f", the embedding tables {byte_count(least.tables)}" if least.tables else ""
    if held is not None and least.memory is not None and held < least.memory + least.tables:
        raise BudgetError(
            f"budget {budget} leaves {byte_count(held)} of memory for what is compressed: the smallest possible is "
            f"{byte_count(least.memory + least.tables)}, of which the compressible layers take "
            f"{byte_count(least.memory)}{tables}; "
            f"the rest of the model takes {byte_count(least.rest_memory)} more"
        )
    if budget.kind == "bytes":
        total = rest_bytes + smallest + least.tables
        if budget.value < total:
            raise BudgetError(
                f"budget {budget} is too small: the smallest possible is {byte_count(total)}, of which the "
                f"compressible layers take {byte_count(smallest)}{tables} and the rest of the checkpoint takes "
                f"{byte_count(rest_bytes)}"
            )
        return
    allowed = budget.compressible_bytes(params, rest_bytes)
    if allowed < smallest:
        raise BudgetError(
            f"budget {budget} leaves {byte_count(allowed)} for the compressible layers: the smallest possible is "
            f"{byte_count(smallest)}, {8 * smallest / params:.3g} bits per weight"
        )


def allocation_step(session: Session) -> str:
    """The name of the step that solves the integer programs of a run."""
    activations = session.config.activations
    return "joint" if activations is not None and activations.choices else "allocate"


def allocation_spec(session: Session, search: Search, budget: Budget) -> StepSpec:
    """The ``allocate`` step of one budget; ``joint`` if bit-widths of activations are chosen as well.

    Raises:
        BudgetError: not even the float rest of the model fits.
    """
    limits = limits_of(session, search, budget)
    if search.widths is not None:
        assert search.activations is not None
        return joint.spec(
            session,
            limits,
            search.layers_ref,
            search.names,
            search.candidates,
            search.sensitivity,
            search.activations,
            search.widths,
            search.tables,
        )
    return allocate.spec(session, limits, search.names, search.candidates, search.sensitivity, search.tables)


def limits_of(session: Session, search: Search, budget: Budget) -> Limits:
    """A budget in bytes of the compressible layers.

    Raises:
        BudgetError: not even the float rest of the model fits.
    """
    held, target = budget.held_bytes(search.rest_memory), session.config.target
    tables = memory = None
    if search.tables is not None:
        counted = budget.kind == "bytes"
        tables = TableBudget(counted, counted or held is not None)
    if target is not None:
        assert search.rest_memory is not None
        memory = Memory(target.text, search.rest_memory, held)
    return Limits(str(budget), search.limit(budget), memory, tables)


def solved(search: Search, budget: Budget, allocation: ArtifactRef) -> Compressed:
    """The result of an integer program."""
    # If bit-widths are chosen, the allocation's artifact holds the plan with the chosen ones.
    model = search.model if search.widths is None else ModelRef(search.model.key, allocation)
    return Compressed(budget, model, allocation)


def run_allocations(
    session: Session, executor: Executor, search: Search, budgets: Sequence[Budget]
) -> list[Compressed]:
    """Solve the integer program of every budget.

    Raises:
        BudgetError: a budget is too small.
    """
    specs = [allocation_spec(session, search, budget) for budget in budgets]
    executor.phase(allocation_step(session), len(specs))
    return [solved(search, budget, executor.run(spec).ref) for budget, spec in zip(budgets, specs, strict=True)]


def allocate_budgets(session: Session, executor: Executor, search: Search, budgets: Sequence[Budget]) -> Allocated:
    """Solve the integer program of every possible budget; all budgets are checked before the first is solved."""
    with session.in_use():
        return _allocate_budgets(session, executor, search, budgets)


def _allocate_budgets(session: Session, executor: Executor, search: Search, budgets: Sequence[Budget]) -> Allocated:
    space = session.artifacts.search_space(search.names, search.candidates, search.sensitivity)
    smallest = Least(
        search.params,
        search.rest_bytes,
        smallest_bytes(space.choices),
        search.rest_memory,
        smallest_memory(space.choices),
        0 if search.tables is None else smallest_tables(session.artifacts.json(search.tables, TABLE_COSTS)),
    )
    found, possible = Allocated(), []
    for budget in budgets:
        try:
            check_budget(budget, smallest)
        except BudgetError as error:
            found.impossible.append((budget, error))
        else:
            possible.append(budget)
    executor.phase(allocation_step(session), len(possible))
    for budget in possible:
        spec = allocation_spec(session, search, budget)
        try:
            found.results.append(solved(search, budget, executor.run(spec).ref))
        except BudgetError as error:  # of the solver, or of the compute budget
            found.impossible.append((budget, error))
    return found


def allocation_json(session: Session, result: Compressed) -> dict[str, Any]:
    """The public result object of a budget whose allocation alone is computed."""
    found = summary.allocation_json(session, result.allocation)
    return found | {"embedding_bytes": None, "embeddings": None, "rest": None}
