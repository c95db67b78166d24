"""The order of a run's steps, whoever carries them out.

``layers (→ activations) → capture → candidates[ℓ] → sensitivity[ℓ] → allocate (→ refine) → round (ℓ in order)
→ pack → evaluate → summary``; what does not depend on the budget comes first and is shared by all budgets. An executor
runs single steps and fan-outs; the Python API brings one that calls them in this process, the flows one that makes
Prefect tasks of them.
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
)
from steps.base import Outcome, StepSpec
from steps.handles import ModelRef
from steps.measuring import labels_digest
from steps.session import Session


class Executor(Protocol):
    """Carries steps out."""

    def run(self, spec: StepSpec) -> Outcome:
        """Run one step (or find its artifact)."""

    def map(self, specs: Sequence[StepSpec]) -> list[Outcome]:
        """Run independent steps, in any order; results in the order given."""

    def phase(self, name: str, total: int) -> None:
        """Announce that ``total`` steps of a kind come next."""


@dataclass
class Search:
    """What all budgets share.

    Attributes:
        layers_ref: the ``layers`` artifact.
        layers: the compressible layers in execution order.
        model: the float model that is compressed, with its LayerNorms folded if activations are quantized.
        capture: the ``capture`` artifact.
        candidates: ``{layer: artifact}``.
        sensitivity: ``{layer: artifact}``.
        activations: the ``activations`` artifact; None where they stay float.
        widths: the ``width_costs`` artifact; None where code widths are not chosen.
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
    """The artifacts of one budget; those after ``allocation`` are None where only the allocation was asked for.

    Attributes:
        budget: as asked for.
        model: the float model that is compressed; where code widths of activations are chosen, with those of this
            budget.
        allocation: what every layer becomes.
        program: the integer program's own solution, if ``allocation`` is one that was found from it.
    """

    budget: Budget
    model: ModelRef
    allocation: ArtifactRef
    program: ArtifactRef | None = None
    checkpoint: ArtifactRef | None = None
    evaluation: ArtifactRef | None = None
    summary: ArtifactRef | None = None


def run_search(session: Session, executor: Executor) -> Search:
    """Everything that does not depend on the budget, except the float model's evaluation."""
    labels_digest(session)  # refuses a cost that the data cannot give before anything is computed
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
    # Large layers first: the last worker to finish then has a small one.
    ordered = sorted(found, key=lambda layer: (-layer.params, layer.order))
    executor.phase("candidates", len(found))
    outcomes = executor.map([candidates.spec(session, model, capture_ref, layers_ref, layer) for layer in ordered])
    search.candidates = {layer.name: outcome.ref for layer, outcome in zip(ordered, outcomes, strict=True)}
    # Early layers cost the most here: more of the model comes after them.
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
        search.widths = executor.run(joint.costs_spec(session, model, layers_ref)).ref
    return search


def compressible_budget(
    session: Session, search_layers: Sequence[Layer], budget: Budget, model: ModelRef | None = None
) -> int:
    """Most bytes that the compressible layers may take under a budget.

    Args:
        session: of the run.
        search_layers: the compressible layers.
        budget: as asked for.
        model: with its plan of activations, where that is known; default: as given.

    Raises:
        BudgetError: not even the float rest of the model fits.
    """
    params = sum(layer.params for layer in search_layers)
    return budget.compressible_bytes(params, pack.rest_bytes_bound(session, search_layers, model))


def allocation_spec(session: Session, search: Search, budget: Budget) -> StepSpec:
    """The ``allocate`` step of one budget; ``joint`` where activations' code widths are chosen with it."""
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
    """The integer program of every budget; where asked, whole allocations are measured and improved afterwards."""
    specs = [allocation_spec(session, search, budget) for budget in budgets]
    executor.phase("allocate", len(specs))
    results = []
    for budget, spec in zip(budgets, specs, strict=True):
        allocation = executor.run(spec).ref
        # Where widths are chosen, the allocation holds the plan with those that it has decided.
        model = search.model if search.widths is None else ModelRef(search.model.key, allocation)
        results.append(Compressed(budget, model, allocation))
    # Whole allocations are not measured where widths are chosen too: programs around them know of no compute budget.
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
        layers: ``{layer: artifact}`` of their rounding.
        blocks: ``{block: artifact}`` of what was reconstructed afterwards.
        tuned: the artifact of all layers' tuning, where there was one.
        last: ``{layer: artifact}`` that changed each layer last.
    """

    layers: dict[str, ArtifactRef] = field(default_factory=dict)
    blocks: dict[str, ArtifactRef] = field(default_factory=dict)
    tuned: ArtifactRef | None = None
    last: dict[str, ArtifactRef] = field(default_factory=dict)


def run_rounding(session: Session, executor: Executor, search: Search, result: Compressed) -> RoundedLayers:
    """Round every layer, one after another where the method needs it; a block is reconstructed when it is complete."""
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
    """Rounding, checkpoint, evaluation and summary of one allocated budget."""
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
        executor: carries steps out.
        budgets: of the run.
        allocate_only: stop after the integer programs.

    Raises:
        BudgetError: a budget is impossible.
    """
    search = run_search(session, executor)
    results = run_allocations(session, executor, search, budgets)
    if allocate_only:
        return results
    executor.phase("baseline", 1)
    float_evaluation = executor.run(baseline.spec(session)).ref
    return [run_budget(session, executor, search, result, float_evaluation) for result in results]


def result_json(session: Session, result: Compressed) -> dict[str, Any]:
    """One budget's public result object: what ``--json`` prints."""
    if result.summary is not None:
        found = summary.read(session.store, result.summary)
        listed = session.artifacts.layers(ArtifactRef.from_json(found["artifacts"]["layers"]))
        return found | {"rest": pack.rest_kinds(session, listed.layers, result.model)}
    unknown = {"embedding_bytes": None, "embeddings": None, "rest": None}
    found = summary.allocation_json(session, result.allocation) | unknown
    found["solver"]["seconds"] = summary.made_in(session.store, result.program or result.allocation)
    return found
