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
from mlorq.forms.base import Candidate
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
from steps.context import Workbench


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
        capture: the ``capture`` artifact.
        candidates: ``{layer: artifact}``.
        sensitivity: ``{layer: artifact}``.
        activations: the ``activations`` artifact; None where they stay float.
        widths: the ``width_costs`` artifact; None where code widths are not chosen.
    """

    layers_ref: ArtifactRef
    layers: list[Layer]
    capture: ArtifactRef
    candidates: dict[str, ArtifactRef] = field(default_factory=dict)
    sensitivity: dict[str, ArtifactRef] = field(default_factory=dict)
    activations: ArtifactRef | None = None
    widths: ArtifactRef | None = None


@dataclass
class Compressed:
    """The artifacts of one budget; those after ``allocation`` are None where only the allocation was asked for.

    ``program`` is the integer program's own solution where ``allocation`` is one that was found from it.
    """

    budget: Budget
    allocation: ArtifactRef
    program: ArtifactRef | None = None
    checkpoint: ArtifactRef | None = None
    evaluation: ArtifactRef | None = None
    summary: ArtifactRef | None = None


def run_search(bench: Workbench, executor: Executor) -> Search:
    """Everything that does not depend on the budget, except the float model's evaluation."""
    sensitivity.cost_params(bench)  # refuses a cost that the data cannot give before anything is computed
    executor.phase("layers", 1)
    layers_ref = executor.run(layers.spec(bench)).ref
    listed = bench.layer_list(layers_ref)
    check_overrides(bench.config.search, listed)
    found = listed.layers
    if bench.config.embeddings is not None:
        executor.phase("embeddings", 1)
        executor.run(embeddings.spec(bench))
    activations_ref = None
    if bench.config.activations is not None:
        executor.phase("activations", 1)
        activations_ref = executor.run(activations.spec(bench, layers_ref)).ref
        bench.use_activations(activations_ref)
    executor.phase("capture", 1)
    capture_ref = executor.run(capture.spec(bench, layers_ref)).ref
    search = Search(layers_ref, found, capture_ref, activations=activations_ref)
    # Large layers first: the last worker to finish then has a small one.
    ordered = sorted(found, key=lambda layer: (-layer.params, layer.order))
    executor.phase("candidates", len(found))
    outcomes = executor.map([candidates.spec(bench, capture_ref, layers_ref, layer) for layer in ordered])
    search.candidates = {layer.name: outcome.ref for layer, outcome in zip(ordered, outcomes, strict=True)}
    # Early layers cost the most here: more of the model comes after them.
    by_cost = sorted(found, key=lambda layer: layer.order)
    executor.phase("sensitivity", len(found))
    outcomes = executor.map(
        [sensitivity.spec(bench, capture_ref, layers_ref, search.candidates[layer.name], layer) for layer in by_cost]
    )
    search.sensitivity = {layer.name: outcome.ref for layer, outcome in zip(by_cost, outcomes, strict=True)}
    if bench.config.activations is not None and bench.config.activations.choices:
        executor.phase("activations", 1)
        search.widths = executor.run(joint.costs_spec(bench)).ref
    return search


def compressible_budget(bench: Workbench, search_layers: Sequence[Layer], budget: Budget) -> int:
    """Most bytes that the compressible layers may take under a budget.

    Raises:
        BudgetError: not even the float rest of the model fits.
    """
    params = sum(layer.params for layer in search_layers)
    return budget.compressible_bytes(params, pack.rest_bytes_bound(bench, search_layers))


def allocation_spec(bench: Workbench, search: Search, budget: Budget) -> StepSpec:
    """The ``allocate`` step of one budget; ``joint`` where activations' code widths are chosen with it."""
    limit = compressible_budget(bench, search.layers, budget)
    names = [layer.name for layer in search.layers]
    if search.widths is not None:
        assert search.activations is not None
        return joint.spec(
            bench,
            budget.text,
            limit,
            search.layers_ref,
            names,
            search.candidates,
            search.sensitivity,
            search.activations,
            search.widths,
        )
    return allocate.spec(bench, budget.text, limit, names, search.candidates, search.sensitivity)


def run_allocations(
    bench: Workbench, executor: Executor, search: Search, budgets: Sequence[Budget]
) -> list[Compressed]:
    """The integer program of every budget; where asked, whole allocations are measured and improved afterwards."""
    if search.activations is not None:
        bench.use_activations(search.activations)  # and not what another budget has decided
    specs = [allocation_spec(bench, search, budget) for budget in budgets]
    executor.phase("allocate", len(specs))
    results = [Compressed(budget, executor.run(spec).ref) for budget, spec in zip(budgets, specs, strict=True)]
    # Whole allocations are not measured where widths are chosen too: programs around them know of no compute budget.
    if bench.config.search.rounds and search.widths is None:
        executor.phase("refine", len(specs))
        for result, spec in zip(results, specs, strict=True):
            result.program = result.allocation
            result.allocation = executor.run(refine.spec(bench, search.capture, search.layers_ref, spec)).ref
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


def run_rounding(bench: Workbench, executor: Executor, search: Search, allocation: ArtifactRef) -> RoundedLayers:
    """Round every layer, one after another where the method needs it; a block is reconstructed when it is complete."""
    rows = bench.store.read_table(allocation, "allocation.parquet").to_pylist()
    chosen = {row["layer"]: Candidate.of_row(row) for row in rows}
    method = METHODS[bench.config.rounding.method]
    blocks = complete_blocks(bench, search) if method.blocks is not None else {}
    executor.phase("round", len(search.layers) + len(blocks))
    result = RoundedLayers()

    def spec(layer: Layer, previous: ArtifactRef | None) -> StepSpec:
        return rounding.spec(bench, search.capture, search.layers_ref, layer, chosen[layer.name], previous)

    if not method.sequential:
        outcomes = executor.map([spec(layer, None) for layer in search.layers])
        refs = {layer.name: outcome.ref for layer, outcome in zip(search.layers, outcomes, strict=True)}
        return RoundedLayers(refs, last=refs)
    previous: ArtifactRef | None = None
    for layer in search.layers:
        previous = executor.run(spec(layer, previous)).ref
        result.layers[layer.name] = result.last[layer.name] = previous
        if layer.name in blocks:
            index, name, inside = blocks[layer.name]
            previous = executor.run(
                reconstruct.spec(bench, search.capture, search.layers_ref, index, name, previous)
            ).ref
            result.blocks[name] = previous
            result.last |= dict.fromkeys(inside, previous)
    if method.tuning is not None and method.tuning.steps(bench.config.rounding) and previous is not None:
        executor.phase("tune", 1)
        result.tuned = executor.run(tune.spec(bench, search.capture, search.layers_ref, previous)).ref
        result.last = dict.fromkeys(result.last, result.tuned)
    return result


def complete_blocks(bench: Workbench, search: Search) -> dict[str, tuple[int, str, list[str]]]:
    """``{its last layer: (index, name, layers)}`` of every block that has layers to compress."""
    listed = bench.layer_list(search.layers_ref)
    found = {}
    for index, name in enumerate(listed.blocks):
        inside = [layer.name for layer in reconstruct.members(listed, index)]
        if inside:
            found[inside[-1]] = (index, name, inside)
    return found


def run_budget(
    bench: Workbench, executor: Executor, search: Search, result: Compressed, float_evaluation: ArtifactRef
) -> Compressed:
    """Rounding, checkpoint, evaluation and summary of one allocated budget."""
    if search.widths is not None:
        bench.use_activations(result.allocation)  # the widths that it has decided
    elif search.activations is not None:
        bench.use_activations(search.activations)
    rounded = run_rounding(bench, executor, search, result.allocation)
    executor.phase("pack", 1)
    result.checkpoint = executor.run(
        pack.spec(bench, search.layers_ref, result.allocation, [rounded.last[layer.name] for layer in search.layers])
    ).ref
    executor.phase("evaluate", 1)
    result.evaluation = executor.run(evaluate.spec(bench, result.checkpoint, float_evaluation)).ref
    executor.phase("summary", 1)
    artifacts = {
        "layers": search.layers_ref,
        **({"plan": search.activations} if search.activations else {}),
        **({"widths": search.widths} if search.widths else {}),
        **{role: ref for role, ref in embeddings.inputs(bench).items() if isinstance(ref, ArtifactRef)},
        "capture": search.capture,
        "allocation": result.allocation,
        **({"program": result.program} if result.program else {}),
        "checkpoint": result.checkpoint,
        "baseline": float_evaluation,
        "evaluation": result.evaluation,
        **{f"candidates/{name}": ref for name, ref in search.candidates.items()},
        **{f"sensitivity/{name}": ref for name, ref in search.sensitivity.items()},
        **{f"round/{name}": ref for name, ref in rounded.layers.items()},
        **{f"reconstruct/{name}": ref for name, ref in rounded.blocks.items()},
        **({"tune": rounded.tuned} if rounded.tuned else {}),
    }
    result.summary = executor.run(summary.spec(bench, artifacts, result.budget.text)).ref
    return result


def run_pipeline(
    bench: Workbench, executor: Executor, budgets: Sequence[Budget], *, allocate_only: bool = False
) -> list[Compressed]:
    """A whole run: one search, then every budget.

    Args:
        bench: the main worker's.
        executor: carries steps out.
        budgets: of the run.
        allocate_only: stop after the integer programs.

    Raises:
        BudgetError: a budget is impossible.
    """
    search = run_search(bench, executor)
    results = run_allocations(bench, executor, search, budgets)
    if allocate_only:
        return results
    executor.phase("baseline", 1)
    float_evaluation = executor.run(baseline.spec(bench)).ref
    return [run_budget(bench, executor, search, result, float_evaluation) for result in results]


def result_json(bench: Workbench, result: Compressed) -> dict[str, Any]:
    """One budget's public result object : what `--json` prints."""
    if result.summary is not None:
        found = summary.read(bench.store, result.summary)
        listed = bench.layer_list(ArtifactRef.from_json(found["artifacts"]["layers"]))
        return found | {"rest": pack.rest_kinds(bench, listed.layers)}
    info = bench.store.read_json(result.allocation, "allocation.json")
    rows = bench.store.read_table(result.allocation, "allocation.parquet").to_pylist()
    unknown = {"embedding_bytes": None, "embeddings": None, "rest": None}
    found = summary.allocation_json(bench, result.allocation, info, rows) | unknown
    found["solver"]["seconds"] = summary.made_in(bench.store, result.program or result.allocation)
    return found
