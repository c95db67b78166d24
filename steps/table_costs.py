"""Step ``table_costs``: what each embedding table costs at each bit-width, for the integer program (METHOD 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from mlorq.artifacts.store import ArtifactRef, json_bytes
from mlorq.config.sections import TableBits
from steps.allocate import TABLE_COSTS
from steps.base import Progress, Step, StepSpec
from steps.handles import DataRef, ModelRef
from steps.measuring import Measuring, measuring

if TYPE_CHECKING:
    from steps.context import Context
    from steps.session import Session

WIDTHS: tuple[int, ...] = get_args(TableBits)


@dataclass(frozen=True)
class Params:
    """How costs are measured, and how tables are quantized (``steps.embeddings``)."""

    measuring: Measuring
    smallest: int
    percentiles: tuple[float, ...]
    widths: tuple[int, ...] = WIDTHS


@dataclass(frozen=True)
class Inputs:
    """The model as given, and the calibration data."""

    model: ModelRef
    calibration: DataRef


def spec(session: Session, layers: ArtifactRef) -> StepSpec:
    """Depends on the model, the samples that costs are measured on, and the candidate ranges.

    Args:
        session: of a run whose configuration has ``embeddings``.
        layers: the ``layers`` artifact.
    """
    settings, search = session.config.embeddings, session.config.search
    assert settings is not None, "the configuration does not quantize embeddings"
    how = measuring(session, session.artifacts.layers(layers).layers)
    params = Params(how, settings.smallest, tuple(search.percentiles))
    return STEP.spec(params, Inputs(session.model_ref, session.calibration_ref))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    import torch
    from torch import nn

    from mlorq.costs.output_cost import OutputCost
    from mlorq.forms.embedding_tables import find_tables, quantize_table, table_size
    from mlorq.models.batches import move_batch

    model = context.model(inputs.model)
    names = find_tables(model.module, params.smallest).tables
    batches, labels = params.measuring.of(context.calibration(inputs.calibration))
    moved = [move_batch(batch, context.device, model.dtype) for batch in batches]
    found: dict[str, dict[str, dict[str, float]]] = {}
    done = 0
    with torch.no_grad():
        cost = OutputCost(params.measuring.cost, [model.outputs(model.module, batch) for batch in moved], labels)
        for name in names:
            table = model.module.get_submodule(name)
            assert isinstance(table, nn.Embedding)
            original, found[name] = table.weight.clone(), {}
            try:
                for bits in params.widths:
                    coded = quantize_table(name, table, bits, params.percentiles)
                    table.weight.copy_(coded.dense())
                    value = cost([model.outputs(model.module, batch) for batch in moved])
                    table.weight.copy_(original)
                    found[name][str(bits)] = {"bytes": table_size(table, bits), "cost": value}
                    done += 1
                    progress(done, len(names) * len(params.widths))
            finally:
                table.weight.copy_(original)
    return {TABLE_COSTS: json_bytes(found)}


STEP = Step("table_costs", 1, Params, Inputs, run)
