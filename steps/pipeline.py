"""The order of a run's steps, independent of the executor that runs them.

``layers (→ activations) → capture → candidates[ℓ] → sensitivity[ℓ] → allocate → round (ℓ in order)
→ pack → evaluate → calibration (→ export) → summary``; steps that do not depend on the budget come first and are shared
by all budgets. An executor runs single steps and fan-outs: that of the Python API calls them in this process, that of
the flows runs them as Prefect tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlorq.artifacts.store import ArtifactRef
from mlorq.config.budget import Budget
from mlorq.config.layer_overrides import check_overrides
from mlorq.forms import Candidate
from mlorq.models.layer_list import Layer
from mlorq.rounding import METHODS
from steps import (
    activations,
    baseline,
    calibration,
    candidates,
    capture,
    embeddings,
    evaluate,
    export,
    layers,
    pack,
    reconstruct,
    rounding,
    search_index,
    sensitivity,
    summary,
    table_costs,
    tune,
    width_costs,
)
from steps.allocations import Compressed, Executor, Search, allocation_json, run_allocations
from steps.base import StepSpec
from steps.handles import ModelRef
from steps.measuring import labels_digest
from steps.session import Session
from steps.smallest import Bisection


def run_search(session: Session, executor: Executor, measure: Callable[[], None] | None = None) -> Search:
    """Run every step that does not depend on the budget, except the float model's evaluation.

    Args:
        session: of the run.
        executor: runs the steps.
        measure: runs that evaluation, which is called once the model is known to fit: it reads all evaluation data, so
            that a damaged image is named before hours of search.
    """
    labels_digest(session)  # raises before anything is computed if the cost needs labels and there are none
    specs: list[StepSpec] = []

    def run(phase: str, spec: StepSpec) -> ArtifactRef:
        executor.phase(phase, 1)
        specs.append(spec)
        return executor.run(spec).ref

    def run_all(phase: str, chosen: Sequence[StepSpec]) -> list[ArtifactRef]:
        executor.phase(phase, len(chosen))
        specs.extend(chosen)
        return [outcome.ref for outcome in executor.map(chosen)]

    layers_ref = run("layers", layers.spec(session))
    listed = session.artifacts.layers(layers_ref)
    check_overrides(session.config.search, listed)
    if measure is not None:
        measure()
    found = listed.layers
    tables = embeddings.fixed(session)
    if tables is not None:
        run("embeddings", tables)
    model, activations_ref = session.model_ref, None
    if session.config.activations is not None:
        activations_ref = run("activations", activations.spec(session, layers_ref))
        model = ModelRef(model.key, activations_ref)
    capture_ref = run("capture", capture.spec(session, model, layers_ref, found))
    # Large layers first: the last steps to run are then short ones.
    ordered = sorted(found, key=lambda layer: (-layer.params, layer.order))
    refs = run_all("candidates", [candidates.spec(session, model, capture_ref, layers_ref, layer) for layer in ordered])
    made = {layer.name: ref for layer, ref in zip(ordered, refs, strict=True)}
    # Early layers first: they take longest, since a measurement runs the model from its layer on.
    by_cost = sorted(found, key=lambda layer: layer.order)
    run_all(
        "sensitivity",
        [sensitivity.spec(session, model, capture_ref, layers_ref, made[layer.name], layer) for layer in by_cost],
    )
    if session.config.activations is not None and session.config.activations.choices:
        run("width_costs", width_costs.spec(session, model, layers_ref))
    if embeddings.are_chosen(session):
        run("table_costs", table_costs.spec(session, layers_ref))
    rest, held = pack.rest_bytes_bound(session, found, model), pack.rest_memory(session, found, model)
    return Search.of_specs(specs, model.key, rest, held, session.artifacts)


def compressible_budget(session: Session, search_layers: Sequence[Layer], budget: Budget) -> int:
    """Budget in bytes of the compressible layers of the model as given.

    Args:
        session: of the run.
        search_layers: the compressible layers.
        budget: the budget.

    Raises:
        BudgetError: not even the float rest of the model fits.
    """
    params = sum(layer.params for layer in search_layers)
    return budget.compressible_bytes(params, pack.rest_bytes_bound(session, search_layers))


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


def run_tables(session: Session, executor: Executor, result: Compressed) -> ArtifactRef | None:
    """The quantized embedding tables of a budget; None if tables stay float."""
    fixed = embeddings.fixed(session)
    if fixed is not None or not embeddings.are_chosen(session):
        return None if fixed is None else fixed.ref  # found or made in the search
    info = session.artifacts.json(result.allocation, "allocation.json")
    executor.phase("embeddings", 1, str(result.budget))
    return executor.run(embeddings.spec(session, info.get("tables", {}))).ref


def run_rounding(
    session: Session, executor: Executor, search: Search, result: Compressed, tables: ArtifactRef | None
) -> RoundedLayers:
    """Round every layer, in execution order if the method requires it; reconstruct each block once it is complete."""
    rows = session.artifacts.table(result.allocation, "allocation.parquet").to_pylist()
    model = result.model
    chosen = {row["layer"]: Candidate.of_row(row) for row in rows}
    method = METHODS[session.config.rounding.method]
    blocks = complete_blocks(session, search) if method.blocks is not None else {}
    executor.phase("round", len(search.layers) + len(blocks), str(result.budget))
    rounded = RoundedLayers()

    def spec(layer: Layer, previous: ArtifactRef | None) -> StepSpec:
        candidate = chosen[layer.name]
        return rounding.spec(session, model, search.capture, search.layers_ref, layer, candidate, previous, tables)

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
                reconstruct.spec(session, model, search.capture, search.layers_ref, index, name, previous, tables)
            ).ref
            rounded.blocks[name] = previous
            rounded.last |= dict.fromkeys(inside, previous)
    if method.tuning is not None and method.tuning.steps(session.config.rounding) and previous is not None:
        executor.phase("tune", 1, str(result.budget))
        tuned = tune.spec(session, model, search.capture, search.layers_ref, previous, tables)
        rounded.tuned = executor.run(tuned).ref
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
    """Run rounding, checkpoint, evaluation, exports and summary of one allocated budget."""
    tables = run_tables(session, executor, result)
    rounded = run_rounding(session, executor, search, result, tables)
    last = [rounded.last[layer.name] for layer in search.layers]
    budget = str(result.budget)
    executor.phase("compressed", 1, budget)
    packed = pack.spec(session, result.model, search.layers_ref, result.allocation, last, tables)
    result.checkpoint = executor.run(packed).ref
    executor.phase("evaluate", 1, budget)
    result.evaluation = executor.run(evaluate.spec(session, result.checkpoint, float_evaluation)).ref
    executor.phase("calibration", 1, budget)
    checked = executor.run(
        calibration.spec(session, search.model, search.layers_ref, search.capture, result.checkpoint, result.evaluation)
    ).ref
    # After the evaluation: a checkpoint that a target cannot hold is then measured all the same.
    exports = export.specs(session, result.checkpoint)
    if exports:
        executor.phase("export", len(exports), budget)
        result.exports = [outcome.ref for outcome in executor.map(exports)]
    executor.phase("summary", 1, budget)
    artifacts = summary.Inputs(
        layers=search.layers_ref,
        plan=search.activations,
        widths=search.widths,
        embeddings=tables,
        table_costs=search.tables,
        capture=search.capture,
        allocation=result.allocation,
        checkpoint=result.checkpoint,
        baseline=float_evaluation,
        evaluation=result.evaluation,
        calibration=checked,
        candidates=search.candidates,
        sensitivity=search.sensitivity,
        round=rounded.layers,
        reconstruct=rounded.blocks,
        tune=rounded.tuned,
        exports=tuple(result.exports),
    )
    result.summary = executor.run(summary.spec(session, artifacts, str(result.budget))).ref
    return result


def run_pipeline(
    session: Session, executor: Executor, budgets: Sequence[Budget], smallest: Bisection | None = None
) -> list[Compressed]:
    """A whole run: one search, then every budget.

    Args:
        session: of the run.
        executor: runs the steps.
        budgets: of the run.
        smallest: gives further budgets, each after the one before it is evaluated.

    Raises:
        BudgetError: a budget is too small.
        ConfigError: an export target needs a package or a folder that is missing, or ``smallest`` asks for more than
            the float model has.
    """
    export.check(session)
    measured = baseline.spec(session)
    with session.in_use():

        def measure() -> None:
            executor.phase("baseline", 1)
            executor.run(measured)
            if smallest is not None:
                smallest.measured(session.artifacts.json(measured.ref, "metrics.json"))

        search = run_search(session, executor, measure)
        search_index.keep(session, search)
        results = run_allocations(session, executor, search, budgets)
        results = [run_budget(session, executor, search, result, measured.ref) for result in results]
        if smallest is not None:
            space = session.artifacts.search_space(search.names, search.candidates, search.sensitivity)
            smallest.searched(space, search.params)
            while (budget := smallest.next()) is not None:
                (result,) = run_allocations(session, executor, search, [budget])
                results.append(run_budget(session, executor, search, result, measured.ref))
                assert result.evaluation is not None
                smallest.evaluated(budget, session.artifacts.json(result.evaluation, "metrics.json")["metrics"])
        return results


def result_json(session: Session, result: Compressed) -> dict[str, Any]:
    """One budget's public result object, as ``--json`` prints it."""
    if result.summary is None:
        return allocation_json(session, result)
    found = summary.read(session.store, result.summary)
    listed = session.artifacts.layers(ArtifactRef.from_json(found["artifacts"]["layers"]))
    return found | {"rest": pack.rest_kinds(session, listed.layers, result.model)}
