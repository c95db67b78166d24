"""Step ``capture``: statistics of the calibration data (docs/METHOD.md, sections 3 and 7).

Output: ``reference.parquet`` (f(x) of every sample), ``activations/<layer>.parquet`` (a bounded random sample of the
layer's inputs), ``moments/<layer>.safetensors`` (the label-free Hessian and, if the metric needs them, moments of
output gradients in two folds), ``inputs/<layer>.safetensors`` (likewise of inputs; ``inputs.json`` has the file of
every layer, since several read one tensor) and, with ``search.token_weights``, ``importance.safetensors`` (weights of
all tokens).

The sums of all layers may not fit into the memory. Then they are taken for some layers at a time, each in passes over
the data of its own, and written before the next (``mlorq.calibration.in_groups``); the files are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from mlorq.artifacts.schemas import matrix_table
from mlorq.artifacts.store import ArtifactRef, json_bytes, table_bytes, tensors_bytes
from mlorq.calibration.collect import capture, input_moments
from mlorq.calibration.covariance import OuterProducts, gradients_tensors, has_moments, in_blocks, inputs_tensors
from mlorq.calibration.in_groups import Stops, groups_within, hessian_bytes, in_groups, inputs_bytes
from mlorq.calibration.label_free_hessian import Mode, label_free_hessian
from mlorq.calibration.token_importance import PASSES, importance_tensors, leaders, token_importance
from mlorq.costs.measured import spread_batches
from mlorq.errors import ConfigError
from mlorq.memory import usable_bytes
from mlorq.models.layer_list import Layer
from mlorq.numbers import byte_count
from steps.artifacts import IMPORTANCE, SHARED_INPUTS, inputs_file, moments_file
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session

ACTIVATION_ROWS = 256


@dataclass(frozen=True)
class Params:
    """Settings of the statistics.

    Attributes:
        rows: number of input tokens kept per layer.
        samples: number of calibration samples for the label-free Hessian.
        probes, min_probes, tolerance, mode: of its estimate (``mlorq.calibration.label_free_hessian``).
        moments: whether moments of inputs and output gradients are accumulated; ``blocks`` if those of the inputs of
            some layers are blocks on the diagonal (``mlorq.memory.block_width``).
        token_weights: exponent of the tokens' weights in the moments; False: equal weights.
        seed: for the choice of rows, and for the probes.
    """

    rows: int
    samples: int
    probes: int
    min_probes: int
    tolerance: float
    mode: Mode
    moments: bool | Literal["blocks"]
    token_weights: bool | float
    seed: int


@dataclass(frozen=True)
class Inputs:
    """The model, the calibration data, and the ``layers`` artifact."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef


def spec(session: Session, model: ModelRef, layers: ArtifactRef, listed: Sequence[Layer]) -> StepSpec:
    """Depends on the model, the calibration data, the layers and the Hessian's settings.

    Args:
        session: of the run.
        model: the model that is observed.
        layers: the ``layers`` artifact.
        listed: its layers.
    """
    search = session.config.search
    moments = search.metric == "moments"
    params = Params(
        rows=ACTIVATION_ROWS,
        samples=search.hessian_samples,
        probes=search.hessian_probes,
        min_probes=search.hessian_min_probes,
        tolerance=search.hessian_tolerance,
        mode=search.hessian_mode,
        moments="blocks" if moments and any(in_blocks(layer) for layer in listed) else moments,
        token_weights=moments and search.token_weights,
        seed=session.config.seed,
    )
    return STEP.spec(params, Inputs(model, session.calibration_ref, layers))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> Iterator[tuple[str, bytes]]:
    bound = usable_bytes(context.device) if context.memory is None else context.memory
    sums = Sums.within(bound, context.artifacts.layers(inputs.layers).layers, bool(params.moments))
    if context.memory is not None:
        sums.check(bound)
    return _files(params, inputs, context, progress, sums)


@dataclass(frozen=True)
class Sums:
    """Which sums are taken in the same passes.

    Attributes:
        inputs: groups of the layers that stand for their input.
        hessians: groups of all layers.
        leader: ``{layer with moments: the layer that stands for its input}``.
    """

    inputs: list[list[Layer]]
    hessians: list[list[Layer]]
    leader: dict[str, str]

    @classmethod
    def within(cls, bound: int, layers: Sequence[Layer], moments: bool) -> Sums:
        """The largest groups that keep within a bound.

        Args:
            bound: bytes.
            layers: in execution order.
            moments: whether second moments are summed.
        """
        leader = leaders([layer for layer in layers if moments and has_moments(layer)])
        leading = [layer for layer in layers if leader.get(layer.name) == layer.name]
        inputs = groups_within(leading, inputs_bytes, bound)
        hessians = groups_within(layers, lambda layer: hessian_bytes(layer, layer.name in leader), bound)
        return cls(inputs, hessians, leader)

    @property
    def bytes(self) -> int:
        """The most bytes that a group takes."""
        return max(
            sum(held for held, _ in sizes) + max((moment for _, moment in sizes), default=0)
            for groups, size in ((self.inputs, inputs_bytes), (self.hessians, self._of_hessian))
            for sizes in [[size(layer) for layer in group] for group in groups]
        )

    def check(self, bound: int) -> None:
        """Check that the sums of every single layer fit.

        Raises:
            ConfigError: those of one do not.
        """
        sizes = [(sum(inputs_bytes(layer)), layer.name) for group in self.inputs for layer in group]
        sizes += [(sum(self._of_hessian(layer)), layer.name) for group in self.hessians for layer in group]
        size, name = max(sizes)
        if size > bound:
            raise ConfigError(
                f"engine.memory is {byte_count(bound)}, and the sums of layer {name!r} alone take "
                f"{byte_count(size)}: allow at least {-(-size // 10**6)}MB, or exclude the layer (search.exclude)"
            )

    def _of_hessian(self, layer: Layer) -> tuple[int, int]:
        return hessian_bytes(layer, layer.name in self.leader)


def _files(
    params: Params, inputs: Inputs, context: Context, progress: Progress, sums: Sums
) -> Iterator[tuple[str, bytes]]:
    """The files of the artifact, each computed when the one before it is written."""
    model = context.model(inputs.model)
    listed = context.artifacts.layers(inputs.layers)
    layers = listed.layers
    batches = listed.batches(context.calibration(inputs.calibration).batches)
    hessian_batches = spread_batches(batches, params.samples)
    # One unit of progress per pass; a backward pass costs about two forwards.
    weighing = (1 + PASSES) * len(batches) if params.token_weights else 0
    captures = max(1, len(sums.inputs))
    before = weighing + captures * len(batches)
    unknown = before + len(sums.hessians) * len(hessian_batches) * params.probes
    progress(0, unknown)
    importance = None
    if params.token_weights:
        importance = token_importance(
            model,
            layers,
            listed.blocks,
            batches,
            power=float(params.token_weights),
            seed=params.seed,
            alone=listed.alone,
            device=context.device,
            progress=lambda done, _: progress((1 + PASSES) * done, unknown),
        )
        yield IMPORTANCE, tensors_bytes(importance_tensors(importance))
    common: dict[str, Any] = {"importance": importance, "alone": listed.alone, "device": context.device}
    captured = capture(
        model,
        layers,
        batches,
        rows=params.rows,
        seed=params.seed,
        moments=names_of(sums.inputs[0]) if sums.inputs else False,
        progress=lambda done, _: progress(weighing + done, unknown),
        **common,
    )
    index = {"sample": torch.arange(captured.reference.shape[0])}
    yield "reference.parquet", table_bytes(matrix_table(captured.reference, "output", index, pa.float32()))
    for layer in layers:
        kept = captured.samples.pop(layer.name)
        table = matrix_table(kept.x, "x", {"sample": kept.sample, "token": kept.token}, pa.float16())
        yield f"activations/{layer.name}.parquet", table_bytes(table)
    yield SHARED_INPUTS, json_bytes(sums.leader)
    found = captured.inputs
    del captured
    for number, group in enumerate(sums.inputs):
        if number:
            start = weighing + number * len(batches)
            found = input_moments(
                model,
                layers,
                batches,
                names_of(group),
                progress=partial(_report, progress, start, unknown),
                **common,
            )
        for layer in group:
            yield inputs_file(layer.name), tensors_bytes(inputs_tensors(found[layer.name]))
            for name in [name for name, first in sums.leader.items() if first == layer.name]:
                del found[name]
    calls = itertools.count()

    def estimate(group: list[Layer], stops: Stops | None) -> tuple[dict[str, Tensor], dict[str, OuterProducts]]:
        call = min(next(calls), len(sums.hessians) - 1)  # the first may be made again
        gradients = {
            layer.name: OuterProducts(layer.out_features, context.device)
            for layer in group
            if layer.name in sums.leader
        }
        hessians = label_free_hessian(
            model,
            layers,
            hessian_batches,
            probes=params.probes,
            min_probes=params.min_probes,
            tolerance=params.tolerance,
            mode=params.mode,
            seed=params.seed,
            gradients=gradients,
            only=names_of(group),
            stops=stops,
            alone=listed.alone,
            device=context.device,
            progress=lambda done, total: progress(before + call * total + done, before + len(sums.hessians) * total),
        )
        return hessians, gradients

    for group, (hessians, gradients) in in_groups(sums.hessians, estimate):
        for layer in group:
            tensors = {"hessian": hessians.pop(layer.name)}
            if layer.name in gradients:
                tensors |= gradients_tensors(gradients.pop(layer.name))
            yield moments_file(layer.name), tensors_bytes(tensors)


def names_of(group: Sequence[Layer]) -> frozenset[str]:
    """The names of layers."""
    return frozenset(layer.name for layer in group)


def _report(progress: Progress, start: int, total: int, done: int, _: int) -> None:
    progress(start + done, total)


STEP = Step("capture", 5, Params, Inputs, run)
