"""Step ``calibration``: whether the calibration data is enough, and of the kind of the evaluation data.

It compares the layers' inputs between the folds of the calibration data, and on up to ``SAMPLES`` samples of the second
fold and of the evaluation data; then the compressed model's output NMSE on ``SAMPLES`` calibration samples with that on
the evaluation data (``mlorq.calibration.coverage``, ``mlorq.calibration.diagnosis``). On the same calibration samples
it measures the relative error of every layer's output, which shows where errors grow (``mlorq.evaluation.depth``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.calibration.covariance import FOLDS, has_moments, moments_of_tensors
from mlorq.calibration.coverage import Coverage, between_folds, damped_factor, held_out, mean_scores
from mlorq.calibration.diagnosis import Diagnosis
from mlorq.calibration.token_importance import leaders
from mlorq.costs.measured import spread_batches
from mlorq.evaluation.depth import compare_outputs
from mlorq.evaluation.outputs import output_nmse
from steps.artifacts import CALIBRATION, DEPTH
from steps.base import NoParams, Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session

SAMPLES = 64


@dataclass(frozen=True)
class Inputs:
    """The model that the search read, its statistics, and the checkpoint with its evaluation.

    ``evaluation`` is None if the evaluation data has no inputs. Then only the folds are compared.
    """

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    checkpoint: ArtifactRef
    evaluated: ArtifactRef
    evaluation: DataRef | None = None


def spec(
    session: Session,
    model: ModelRef,
    layers: ArtifactRef,
    capture: ArtifactRef,
    checkpoint: ArtifactRef,
    evaluated: ArtifactRef,
) -> StepSpec:
    """Depends on the statistics of the calibration data, and on the checkpoint and its evaluation.

    Args:
        session: of the run.
        model: the model that ``capture`` read.
        layers, capture, checkpoint, evaluated: the artifacts; the last is that of step ``evaluate``.
    """
    evaluation = session.evaluation_ref if session.evaluation.batches else None
    return STEP.spec(
        NoParams(), Inputs(model, session.calibration_ref, layers, capture, checkpoint, evaluated, evaluation)
    )


def run(params: NoParams, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    calibration = context.calibration(inputs.calibration)
    covered = list(_covered(inputs, context))
    nmse, depth = ({}, {}) if inputs.evaluation is None else _output_errors(inputs, context, progress)
    diagnosis = Diagnosis(calibration.samples, covered, nmse)
    return {CALIBRATION: json_bytes(diagnosis.to_json()), DEPTH: json_bytes(depth)}


def _covered(inputs: Inputs, context: Context) -> Iterator[Coverage]:
    """The layers' inputs between the folds, and on evaluation data."""
    listed = context.artifacts.layers(inputs.layers)
    layers = [layer for layer in listed.layers if has_moments(layer)]
    found: dict[str, Coverage] = {}
    factors: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(leaders(layers).values()):
        tensors = context.artifacts.moments(inputs.capture, name)
        if "inputs" not in tensors:
            return  # the search's metric reads no moments
        folds = moments_of_tensors(tensors, context.device)
        factor = damped_factor(folds[0].inputs) if len(folds) == FOLDS else None
        if factor is not None:
            found[name], factors[name] = between_folds(name, folds, factor), factor
    if inputs.evaluation is None or not factors:
        yield from found.values()
        return
    model, calibration = context.model(inputs.model), context.calibration(inputs.calibration)
    own = mean_scores(
        model,
        factors,
        list(held_out(listed.batches(calibration.batches), calibration.samples, SAMPLES)),
        device=context.device,
    )
    chosen = spread_batches(context.evaluation(inputs.evaluation).batches, SAMPLES)
    other = mean_scores(model, factors, listed.batches(chosen), device=context.device)
    for name, coverage in found.items():
        yield replace(coverage, evaluation=other[name] / own[name]) if own[name] > 0 else coverage


def _output_errors(inputs: Inputs, context: Context, progress: Progress) -> tuple[dict[str, float], dict[str, float]]:
    """Output NMSE of the compressed model on calibration samples and on the evaluation data; NMSE by layer."""
    model = context.model(ModelRef(inputs.model.key))
    batches = spread_batches(context.calibration(inputs.calibration).batches, SAMPLES)
    module = context.compressed(inputs.checkpoint, model)
    names = [layer.name for layer in context.artifacts.layers(inputs.layers).layers]
    compared = compare_outputs(model, module, batches, names, device=context.device, progress=progress)
    evaluated = context.artifacts.json(inputs.evaluated, "metrics.json")["nmse"]
    nmse = {"calibration": output_nmse(compared.outputs, compared.reference), "evaluation": evaluated}
    return nmse, compared.layers


STEP = Step("calibration", 2, NoParams, Inputs, run)
