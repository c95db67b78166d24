"""Step ``refine``: an allocation improved by measurements of the whole model (docs/METHOD.md, section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlorq.allocation.choices import Choices, allocation_table, smallest_bytes
from mlorq.allocation.program import Program
from mlorq.allocation.program import solve as solve_program
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes
from mlorq.fitting.settings import FitSettings
from steps import allocate as program
from steps.allocate import joined
from steps.base import Needs, Progress, Step, StepSpec
from steps.handles import DataRef, ModelRef
from steps.measuring import Measuring, measuring

if TYPE_CHECKING:
    from torch import Tensor

    from mlorq.allocation.refinement import WholeModel
    from steps.context import Context
    from steps.session import Session

WHOLE_SAMPLES = 4  # factor on the number of samples for a layer's costs


@dataclass(frozen=True)
class Params:
    """How an allocation is improved.

    Attributes:
        program: parameters of the ``allocate`` step whose result is refined.
        rounds: maximum number of rounds; each measures the whole model and solves a rescaled program.
        measuring: of the cost.
        fit: of the candidates' matrices.
    """

    program: program.Params
    rounds: int
    measuring: Measuring
    fit: FitSettings


@dataclass(frozen=True)
class Inputs:
    """The model, the data, the allocation, and the inputs of the allocation."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    allocation: ArtifactRef
    candidates: Mapping[str, ArtifactRef]
    sensitivity: Mapping[str, ArtifactRef]


def spec(
    session: Session, model: ModelRef, capture: ArtifactRef, layers: ArtifactRef, allocation: StepSpec
) -> StepSpec:
    """Depends on the allocation and its inputs, the model and the calibration data.

    Args:
        session: of the run.
        model: the model to compress.
        capture: the ``capture`` artifact.
        layers: the ``layers`` artifact.
        allocation: the ``allocate`` step whose result is refined.
    """
    search = session.config.search
    solved, made_from = program.STEP.read(allocation)
    listed = session.artifacts.layers(layers).layers
    params = Params(solved, search.rounds, measuring(session, listed), search.fit)
    inputs = Inputs(
        model,
        session.calibration_ref,
        layers,
        capture,
        allocation.ref,
        made_from.candidates,
        made_from.sensitivity,
    )
    numbers = sum(layer.params for layer in listed)
    hardest = max(Needs.of_layer(layer).memory_bytes for layer in listed)
    # Two copies of the model, and the dense weights of each layer's tried candidates (three or four in observed runs).
    return STEP.spec(params, inputs, needs=Needs(True, 4 * (2 + 4) * numbers + hardest))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    from mlorq.allocation.refinement import POWERS, WholeModel, refine
    from mlorq.costs.measured import dense_of
    from steps.candidates import fits_of

    artifacts, budget_bytes = context.artifacts, params.program.budget_bytes
    listed = artifacts.layers(inputs.layers)
    layers = [listed[name] for name in params.program.layers]
    choices, rows = joined(artifacts, params.program.layers, inputs.candidates, inputs.sensitivity)
    ordered = [rows[layer.name] for layer in layers]
    first = artifacts.table(inputs.allocation, "allocation.parquet").to_pylist()
    chosen = {row["layer"]: row["candidate_id"] for row in first}
    start = [
        next(index for index, row in enumerate(layer_rows) if row["candidate_id"] == chosen[layer.name])
        for layer, layer_rows in zip(layers, ordered, strict=True)
    ]
    data = context.calibration(inputs.calibration)
    # Differences between whole allocations are small, and few allocations are measured: they get more samples.
    whole, part = (
        WholeModel(
            context.model(inputs.model),
            listed.blocks,
            batches,
            context.device,
            cost=params.measuring.cost,
            labels=labels,
            activations=context.plan(inputs.model),
        )
        for batches, labels in (params.measuring.of(data, times) for times in (WHOLE_SAMPLES, 1))
    )
    weights: dict[tuple[str, int], Tensor] = {}
    # Measured allocations: the program's, the uniform one, Q alone, powers; per round one more and its contributions.
    total = ((3 + len(POWERS) if params.rounds else 2) + 2 * params.rounds) * len(layers)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    def set_all(model: WholeModel, picked: Sequence[int]) -> dict[str, Tensor]:
        found = {}
        for layer, index, layer_rows in zip(layers, picked, ordered, strict=True):
            if (layer.name, index) not in weights:
                fit = fits_of(context, inputs.model, inputs.capture, layer, params.fit).search
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
        return solve_program(Program(costs, budget_bytes, objective=params.program.objective), **solver).picked

    solver = params.program.solver_settings
    measured = refine(choices, ordered, budget_bytes, start, solve, measure, contributions, params.rounds)
    progress(total, total)
    kept = measured[0]
    table = allocation_table(choices, kept.picked, rows)
    before = artifacts.json(inputs.allocation, "allocation.json")
    info = before | {
        "bytes": kept.bytes,
        "smallest_bytes": smallest_bytes(choices),
        "predicted_cost": kept.predicted,
        "measured_cost": kept.measured,
        "measured": [one.to_json() for one in measured],
    }
    return {"allocation.parquet": table_bytes(table), "allocation.json": json_bytes(info)}


STEP = Step("refine", 5, Params, Inputs, run)
