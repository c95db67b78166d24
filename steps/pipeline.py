"""The order of a run's steps, independent of the executor that runs them.

``layers (→ activations) → capture → candidates[ℓ] → sensitivity[ℓ] → allocate (→ refine) → round (ℓ in order)
→ pack → evaluate → summary``; steps that do not depend on the budget come first and are shared by all budgets. An
executor runs single steps and fan-outs: that of the Python API calls them in this process, that of the flows runs them
as Prefect tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlorq.artifacts.store import ArtifactRef
from mlorq.config.budget import Budget
from mlorq.config.layer_overrides import check_overrides
from mlorq.forms import Candidate
from mlorq.models.layers import Layer
from mlorq.rounding import METHODS
from steps import (
    activations,
    allocate,
    baseline,
    candidates,
    capture,
    embeddings,
    evaluate,
    joint,
    layers,
    pack,
    reconstruct,
    refine,
    rounding,
    sensitivity,
    summary,
    tune,
    width_costs,
)
from steps.base import Outcome, StepSpec
from steps.handles import ModelRef
from steps.measuring import labels_digest
from steps.session import Session


class Executor(Protocol):
    """Runs steps."""

    def run(self, spec: StepSpec) -> Outcome:
        """Run one step, or find its artifact."""

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """Run independent steps, in any order; results in the order given."""

    def phase(self, name: str, total: int) -> None:
        """Announce the next phase: ``total`` steps of one kind."""


@dataclass
class Search:
    """Artifacts of the search, shared by all budgets.

    Attributes:
        layers_ref: the ``layers`` artifact.
        layers: the compressible layers in execution order.
        model: the float model that is compressed, with its LayerNorms folded if activations are quantized.
        capture: the ``capture`` artifact.
        candidates: ``{layer: artifact}``.
        sensitivity: ``{layer: artifact}``.
        activations: the ``activations`` artifact; None if activations stay float.
        widths: the ``width_costs`` artifact; None if bit-widths of activations are not chosen.
    """

    layers_ref: ArtifactRef
    layers: list[Layer]
    model: ModelRef
    capture: ArtifactRef
    candidates: dict[str, ArtifactRef] = field(default_factory=dict)
    sensitivity: dict[str, ArtifactRef] = field(default_factory=dict)
    activations: ArtifactRef | None = None
    widths: ArtifactRef | None = None


@dataclass
class Compressed:
    """The artifacts of one budget; those after ``allocation`` are None if only the allocation is computed.

    Attributes:
        budget: the budget.
        model: the float model that is compressed; if bit-widths of activations are chosen, with those of this budget.
        allocation: the chosen candidate of every layer.
        program: the solution of the integer program, if ``allocation`` was refined from it.
    """

    budget: Budget
    model: ModelRef
    allocation: ArtifactRef
    program: ArtifactRef | None = None
    checkpoint: ArtifactRef | None = None
    evaluation: ArtifactRef | None = None
    summary: ArtifactRef | None = None


def run_search(session: Session, executor: Executor) -> Search:
    """Run every step that does not depend on the budget, except the float model's evaluation."""
    labels_digest(session)  # raises before anything is computed if the cost needs labels and there are none
    executor.phase("layers", 1)
    layers_ref = executor.run(layers.spec(session)).ref
    listed = session.artifacts.layers(layers_ref)
    check_overrides(session.config.search, listed)
    found = listed.layers
    if session.config.embeddings is not None:
        executor.phase("embeddings", 1)
        executor.run(embeddings.spec(session))
    model, activations_ref = session.model_ref, None
    if session.config.activations is not None:
        executor.phase("activations", 1)
        activations_ref = executor.run(activations.spec(session, layers_ref)).ref
        model = ModelRef(model.key, activations_ref)
    executor.phase("capture", 1)
    capture_ref = executor.run(capture.spec(session, model, layers_ref)).ref
    search = Search(layers_ref, found, model, capture_ref, activations=activations_ref)
    # Large layers first: the last steps to run are then short ones.
    ordered = sorted(found, key=lambda layer: (-layer.params, layer.order))
    executor.phase("candidates", len(found))
    outcomes = executor.map([candidates.spec(session, model, capture_ref, layers_ref, layer) for layer in ordered])
    search.candidates = {layer.name: outcome.ref for layer, outcome in zip(ordered, outcomes, strict=True)}
    # Early layers first: they take longest, since a measurement runs the model from its layer on.
    by_cost = sorted(found, key=lambda layer: layer.order)
    executor.phase("sensitivity", len(found))
    outcomes = executor.map(
        [
            sensitivity.spec(session, model, capture_ref, layers_ref, search.candidates[layer.name], layer)
            for layer in by_cost
        ]
    )
    search.sensitivity = {layer.name: outcome.ref for layer, outcome in zip(by_cost, outcomes, strict=True)}
    if session.config.activations is not None and session.config.activations.choices:
        executor.phase("activations", 1)
        search.widths = executor.run(width_costs.spec(session, model, layers_ref)).ref
    return search


def compressible_budget(
    session: Session, search_layers: Sequence[Layer], budget: Budget, model: ModelRef | None = None
) -> int:
    """Budget in bytes of the compressible layers.

    Args:
        session: of the run.
        search_layers: the compressible layers.
        budget: the budget.
        model: the model with its activation plan, if that is known; default: the model as given.

    Raises:
        BudgetError: not even the float rest of the model fits.
    """
    params = sum(layer.params for layer in search_layers)
    return budget.compressible_bytes(params, pack.rest_bytes_bound(session, search_layers, model))


def allocation_spec(session: Session, search: Search, budget: Budget) -> StepSpec:
    """The ``allocate`` step of one budget; ``joint`` if bit-widths of activations are chosen as well."""
    limit = compressible_budget(session, search.layers, budget, search.model)
    names = [layer.name for layer in search.layers]
    if search.widths is not None:
        assert search.activations is not None
        return joint.spec(
            session,
            budget.text,
            limit,
            search.layers_ref,
            names,
            search.candidates,
            search.sensitivity,
            search.activations,
            search.widths,
        )
    return allocate.spec(session, budget.text, limit, names, search.candidates, search.sensitivity)


def run_allocations(
    session: Session, executor: Executor, search: Search, budgets: Sequence[Budget]
) -> list[Compressed]:
    """Solve the integer program of every budget; with ``search.rounds``, refine the allocations afterwards."""
    specs = [allocation_spec(session, search, budget) for budget in budgets]
    executor.phase("allocate", len(specs))
    results = []
    for budget, spec in zip(budgets, specs, strict=True):
        allocation = executor.run(spec).ref
        # If bit-widths are chosen, the allocation's artifact holds the plan with the chosen ones.
        model = search.model if search.widths is None else ModelRef(search.model.key, allocation)
        results.append(Compressed(budget, model, allocation))
    # No refinement if bit-widths are chosen: its programs have no compute budget.
    if session.config.search.rounds and search.widths is None:
        executor.phase("refine", len(specs))
        for result, spec in zip(results, specs, strict=True):
            result.program = result.allocation
            result.allocation = executor.run(
                refine.spec(session, search.model, search.capture, search.layers_ref, spec)
            ).ref
    return results


@dataclass
class RoundedLayers:
    """The artifacts of the layers' codes.

    Attributes:
        layers: ``{layer: artifact}`` of the rounding.
        blocks: ``{block: artifact}`` of the block reconstruction.
        tuned: the artifact of the joint tuning of all layers, if there is any.
        last: ``{layer: artifact}``, the last artifact that changed each layer.
    """

    layers: dict[str, ArtifactRef] = field(default_factory=dict)
    blocks: dict[str, ArtifactRef] = field(default_factory=dict)
    tuned: ArtifactRef | None = None
    last: dict[str, ArtifactRef] = field(default_factory=dict)


def run_rounding(session: Session, executor: Executor, search: Search, result: Compressed) -> RoundedLayers:
    """Round every layer, in execution order if the method requires it; reconstruct each block once it is complete."""
    rows = session.artifacts.table(result.allocation, "allocation.parquet").to_pylist()
    model = result.model
    chosen = {row["layer"]: Candidate.of_row(row) for row in rows}
    method = METHODS[session.config.rounding.method]
    blocks = complete_blocks(session, search) if method.blocks is not None else {}
    executor.phase("round", len(search.layers) + len(blocks))
    rounded = RoundedLayers()

    def spec(layer: Layer, previous: ArtifactRef | None) -> StepSpec:
        candidate = chosen[layer.name]
        return rounding.spec(session, model, search.capture, search.layers_ref, layer, candidate, previous)

    if not method.sequential:
        outcomes = executor.map([spec(layer, None) for layer in search.layers])
        refs = {layer.name: outcome.ref for layer, outcome in zip(search.layers, outcomes, strict=True)}
        return RoundedLayers(refs, last=refs)
    previous: ArtifactRef | None = None
    for layer in search.layers:
        previous = executor.run(spec(layer, previous)).ref
        rounded.layers[layer.name] = rounded.last[layer.name] = previous
        if layer.name in blocks:
            index, name, inside = blocks[layer.name]
            previous = executor.run(
                reconstruct.spec(session, model, search.capture, search.layers_ref, index, name, previous)
            ).ref
            rounded.blocks[name] = previous
            rounded.last |= dict.fromkeys(inside, previous)
    if method.tuning is not None and method.tuning.steps(session.config.rounding) and previous is not None:
        executor.phase("tune", 1)
        rounded.tuned = executor.run(tune.spec(session, model, search.capture, search.layers_ref, previous)).ref
        rounded.last = dict.fromkeys(rounded.last, rounded.tuned)
    return rounded


def complete_blocks(session: Session, search: Search) -> dict[str, tuple[int, str, list[str]]]:
    """``{its last layer: (index, name, layers)}`` of every block that has layers to compress."""
    listed = session.artifacts.layers(search.layers_ref)
    found = {}
    for index, name in enumerate(listed.blocks):
        inside = [layer.name for layer in reconstruct.members(listed, index)]
        if inside:
            found[inside[-1]] = (index, name, inside)
    return found


def run_budget(
    session: Session, executor: Executor, search: Search, result: Compressed, float_evaluation: ArtifactRef
) -> Compressed:
    """Run rounding, checkpoint, evaluation and summary of one allocated budget."""
    rounded = run_rounding(session, executor, search, result)
    last = [rounded.last[layer.name] for layer in search.layers]
    executor.phase("pack", 1)
    result.checkpoint = executor.run(pack.spec(session, result.model, search.layers_ref, result.allocation, last)).ref
    executor.phase("evaluate", 1)
    result.evaluation = executor.run(evaluate.spec(session, result.checkpoint, float_evaluation)).ref
    executor.phase("summary", 1)
    artifacts = summary.Inputs(
        layers=search.layers_ref,
        plan=search.activations,
        widths=search.widths,
        embeddings=embeddings.artifact(session),
        capture=search.capture,
        allocation=result.allocation,
        program=result.program,
        checkpoint=result.checkpoint,
        baseline=float_evaluation,
        evaluation=result.evaluation,
        candidates=search.candidates,
        sensitivity=search.sensitivity,
        round=rounded.layers,
        reconstruct=rounded.blocks,
        tune=rounded.tuned,
    )
    result.summary = executor.run(summary.spec(session, artifacts, result.budget.text)).ref
    return result


def run_pipeline(
    session: Session, executor: Executor, budgets: Sequence[Budget], *, allocate_only: bool = False
) -> list[Compressed]:
    """A whole run: one search, then every budget.

    Args:
        session: of the run.
        executor: runs the steps.
        budgets: of the run.
        allocate_only: stop after the integer programs.

    Raises:
        BudgetError: a budget is too small.
    """
    search = run_search(session, executor)
    results = run_allocations(session, executor, search, budgets)
    if allocate_only:
        return results
    executor.phase("baseline", 1)
    float_evaluation = executor.run(baseline.spec(session)).ref
    return [run_budget(session, executor, search, result, float_evaluation) for result in results]


def result_json(session: Session, result: Compressed) -> dict[str, Any]:
    """One budget's public result object, as ``--json`` prints it."""
    if result.summary is not None:
        found = summary.read(session.store, result.summary)
        listed = session.artifacts.layers(ArtifactRef.from_json(found["artifacts"]["layers"]))
        return found | {"rest": pack.rest_kinds(session, listed.layers, result.model)}
    unknown = {"embedding_bytes": None, "embeddings": None, "rest": None}
    found = summary.allocation_json(session, result.allocation) | unknown
    found["solver"]["seconds"] = summary.seconds_of(session.store, result.program or result.allocation)
    return found
