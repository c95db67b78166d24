"""Step ``layers``: the model's compressible layers (``layers.parquet``), its blocks and the skipped layers."""

from __future__ import annotations

from dataclasses import dataclass

from mlorq.artifacts.store import json_bytes, table_bytes
from mlorq.models.layer_list import LayerList, layers_table
from mlorq.models.layers import find_layers
from steps.base import Progress, Step, StepSpec
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
    """The model as given, and the calibration data, whose first batch it is run on."""

    model: ModelRef
    calibration: DataRef


def records(session: Session) -> tuple[Params, Inputs]:
    """Parameters and inputs of the step."""
    search = session.config.search
    params = Params(tuple(search.include), tuple(search.exclude))
    return params, Inputs(session.model_ref, session.calibration_ref)


def spec(session: Session) -> StepSpec:
    """Depends on the model, one batch of the calibration data, and the layer patterns."""
    return STEP.spec(*records(session))


def discover(session: Session) -> LayerList:
    """The layers, found without reading or writing the store (for a dry run)."""
    return _discover(*records(session), session.worker.context)


def _discover(params: Params, inputs: Inputs, context: Context) -> LayerList:
    return find_layers(
        context.model(inputs.model),
        context.calibration(inputs.calibration).batches[0],
        include=params.include,
        exclude=params.exclude,
        device=context.device,
    )


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    found = _discover(params, inputs, context)
    return {
        "layers.parquet": table_bytes(layers_table(found.layers)),
        "model.json": json_bytes(
            {
                "architecture": context.model(inputs.model).architecture,
                "blocks": found.blocks,
                "skipped": [list(item) for item in found.skipped],
            }
        ),
    }


STEP = Step("layers", 2, Params, Inputs, run)
