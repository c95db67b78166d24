"""Step ``layers``: the model's compressible layers (``layers.parquet``), its blocks, and what stays float."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from mlorq.artifacts.store import json_bytes, table_bytes
from mlorq.forms.trial import changed_by_replacement
from mlorq.models.layer_list import LayerList, layers_table
from mlorq.models.layers import check_any, find_layers
from steps.base import Needs, Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """Name patterns of the layers to compress, and of those to skip."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """The model as given, and the calibration data: its first batch, and others while some experts are not reached."""

    model: ModelRef
    calibration: DataRef


def records(session: Session) -> tuple[Params, Inputs]:
    """Parameters and inputs of the step."""
    search = session.config.search
    params = Params(tuple(search.include), tuple(search.exclude))
    return params, Inputs(session.model_ref, session.calibration_ref)


def spec(session: Session) -> StepSpec:
    """Depends on the model, one batch of the calibration data, and the layer patterns.

    The process of the flow has found the layers to check the run (``discover``), so no other has to.
    """
    return STEP.spec(*records(session), needs=Needs(device=False))


def discover(session: Session) -> LayerList:
    """The layers, found without reading or writing the store (for checks and dry runs)."""
    return _found(*records(session), session.worker.context)


def _found(params: Params, inputs: Inputs, context: Context) -> LayerList:
    return context.layers((params, inputs), lambda: _discover(params, inputs, context))


def _discover(params: Params, inputs: Inputs, context: Context) -> LayerList:
    model, batches = context.model(inputs.model), context.calibration(inputs.calibration).batches
    batch = batches[0]
    found = find_layers(
        model,
        batch,
        more=islice(batches, 1, None),
        include=params.include,
        exclude=params.exclude,
        device=context.device,
    )
    changed = changed_by_replacement(model, found.layers, batch, context.device)
    if not changed:
        return found
    found = found.without(changed, lambda layer: layer.params * model.dtype.itemsize)
    check_any(found.layers, found.skipped, params.include, params.exclude)
    return found


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    found = _found(params, inputs, context)
    alone = {"alone": list(found.alone)} if found.alone else {}
    return {
        "layers.parquet": table_bytes(layers_table(found.layers)),
        "model.json": json_bytes(
            {
                "architecture": context.model(inputs.model).architecture,
                "blocks": found.blocks,
                "skipped": [list(item) for item in found.skipped],
                "others": [list(item) for item in found.others],
                **alone,
            }
        ),
    }


STEP = Step("layers", 7, Params, Inputs, run)
