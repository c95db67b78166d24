"""Step ``refine``: one budget's allocation, measured on the whole model and improved by programs around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mlorq.allocation.choices import Choices, allocation_table, smallest_bytes
from mlorq.allocation.program import Program
from mlorq.allocation.program import solve as solve_program
from mlorq.allocation.refinement import POWERS, WholeModel, refine
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes
from mlorq.costs.measured import dense_of
from mlorq.fitting.settings import FitSettings
from steps.allocate import SOLVER, joined
from steps.base import Needs, Progress, Step, StepSpec
from steps.candidates import fit_params
from steps.context import Workbench
from steps.sensitivity import cost_params

WHOLE_SAMPLES = 4  # times those that a layer's costs are measured on


def spec(bench: Workbench, capture: ArtifactRef, layers: ArtifactRef, allocation: StepSpec) -> StepSpec:
    """Depends on all that the allocation depends on, the model and the calibration data.

    Args:
        bench: of the run.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        allocation: the ``allocate`` step whose result is refined.
    """
    search = bench.config.search
    params = {
        **allocation.params,
        "rounds": search.rounds,
        "samples": search.samples,
        **cost_params(bench),
        "fit": fit_params(search),
    }
    inputs: dict[str, ArtifactRef | str] = {
        **bench.model_inputs,
        "calibration": bench.calibration.key,
        "layers": layers,
        "capture": capture,
        "allocation": allocation.ref,
        **allocation.inputs,
    }
    listed = bench.layer_list(layers).layers
    numbers = sum(layer.params for layer in listed)
    hardest = max(Needs.of_layer(layer).memory_bytes for layer in listed)
    # Two copies of the model, and of each layer the weights that were tried: three or four in all runs looked at.
    return replace(STEP.spec(params, inputs), needs=Needs(True, 4 * (2 + 4) * numbers + hardest))


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params = spec.params
    listed = bench.layer_list(spec.artifact("layers"))
    layers = [listed[name] for name in params["layers"]]
    settings = FitSettings.model_validate(params["fit"])
    choices, rows = joined(spec, bench)
    ordered = [rows[layer.name] for layer in layers]
    first = bench.store.read_table(spec.artifact("allocation"), "allocation.parquet").to_pylist()
    chosen = {row["layer"]: row["candidate_id"] for row in first}
    start = [
        next(index for index, row in enumerate(layer_rows) if row["candidate_id"] == chosen[layer.name])
        for layer, layer_rows in zip(layers, ordered, strict=True)
    ]
    fitted = bench.fits(layers[0], spec.artifact("capture"), settings)[0].held_out
    # Differences between whole allocations are small and few are measured; of single layers there are many.
    whole, part = (
        WholeModel(
            bench.model,
            listed.blocks,
            batches,
            bench.device,
            cost=params["cost"],
            labels=labels,
            activations=bench.plan,
        )
        for batches, labels in (
            bench.measuring(times * params["samples"], held_out=fitted) for times in (WHOLE_SAMPLES, 1)
        )
    )
    weights: dict[tuple[str, int], Tensor] = {}
    # Allocations: the program's, the uniform one, codes alone, powers, and in each round one and its contributions.
    total = ((3 + len(POWERS) if params["rounds"] else 2) + 2 * params["rounds"]) * len(layers)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    def set_all(model: WholeModel, picked: Sequence[int]) -> dict[str, Tensor]:
        found = {}
        for layer, index, layer_rows in zip(layers, picked, ordered, strict=True):
            if (layer.name, index) not in weights:
                fit, _ = bench.fits(layer, spec.artifact("capture"), settings)
                weights[layer.name, index] = dense_of(fit, layer_rows[index])
            found[layer.name] = weights[layer.name, index]
            model.set(layer, found[layer.name])
            if model is whole:
                advance()
        return found

    def measure(picked: Sequence[int]) -> float:
        set_all(whole, picked)
        return whole.cost()

    def contributions(picked: Sequence[int]) -> list[float]:
        return part.contributions(layers, set_all(part, picked), lambda _: advance())

    def solve(costs: Sequence[Choices]) -> list[int]:
        program = Program(costs, params["budget_bytes"], objective=params["objective"])
        return solve_program(program, **{name: params[name] for name in SOLVER}).picked

    measured = refine(choices, ordered, params["budget_bytes"], start, solve, measure, contributions, params["rounds"])
    progress(total, total)
    kept = measured[0]
    table = allocation_table(choices, kept.picked, rows)
    before = bench.store.read_json(spec.artifact("allocation"), "allocation.json")
    info = before | {
        "bytes": kept.bytes,
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": kept.predicted,
        "measured_cost": kept.measured,
        "measured": [one.to_json() for one in measured],
    }
    return {"allocation.parquet": table_bytes(table), "allocation.json": json_bytes(info)}


STEP = Step("refine", 5, run)
