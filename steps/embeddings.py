"""Step ``embeddings``: quantized embedding tables of the model (docs/METHOD.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.forms.embedding_tables import find_tables, quantize_table, tables_json
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """Bit-width, number of entries of the smallest table to quantize, and percentiles of the candidate ranges."""

    bits: int
    smallest: int
    percentiles: tuple[float, ...]


@dataclass(frozen=True)
class Inputs:
    """The model as given."""

    model: ModelRef


def spec(session: Session) -> StepSpec:
    """Depends on the model, the bit-width and the candidate ranges; on no data."""
    settings = session.config.embeddings
    assert settings is not None, "the configuration does not quantize embeddings"
    params = Params(settings.bits, settings.smallest, tuple(session.config.search.percentiles))
    return STEP.spec(params, Inputs(session.model_ref))


def artifact(session: Session) -> ArtifactRef | None:
    """The artifact of the run's quantized tables; None if tables stay float."""
    return None if session.config.embeddings is None else spec(session).ref


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    module = context.model(inputs.model).module
    found = find_tables(module, params.smallest)
    tables, files = {}, {}
    for index, name in enumerate(found.tables):
        table = module.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        tables[name] = quantize_table(name, table, params.bits, params.percentiles)
        files[f"{name}.safetensors"] = tensors_bytes(tables[name].tensors())
        progress(index + 1, len(found.tables))
    return {**files, "embeddings.json": json_bytes(tables_json(found, tables))}


STEP = Step("embeddings", 1, Params, Inputs, run)
