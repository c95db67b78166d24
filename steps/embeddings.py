"""Step ``embeddings``: quantized embedding tables of the model (docs/METHOD.md, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mlorq.artifacts.store import json_bytes, tensors_bytes
from mlorq.forms.embedding_tables import find_tables, quantize_table, tables_json
from steps.base import Progress, Step, StepSpec
from steps.context import Context
from steps.handles import ModelRef
from steps.session import Session

AUTO = "auto"


@dataclass(frozen=True)
class Params:
    """How tables are quantized.

    Attributes:
        bits: bit-width of all tables, or of each.
        smallest: tables with fewer entries stay float.
        percentiles: of the candidate ranges.
    """

    bits: int | Mapping[str, int]
    smallest: int
    percentiles: tuple[float, ...]


@dataclass(frozen=True)
class Inputs:
    """The model as given."""

    model: ModelRef


def spec(session: Session, bits: Mapping[str, int] | None = None) -> StepSpec:
    """Depends on the model, the bit-widths and the candidate ranges; on no data.

    Args:
        session: of a run whose configuration has ``embeddings``.
        bits: of each table, as an integer program chose them; None: that of the configuration.
    """
    settings = session.config.embeddings
    assert settings is not None, "the configuration does not quantize embeddings"
    chosen = settings.bits if bits is None else bits
    assert not isinstance(chosen, str), "the integer program chooses the bit-widths"
    params = Params(chosen, settings.smallest, tuple(session.config.search.percentiles))
    return STEP.spec(params, Inputs(session.model_ref))


def are_chosen(session: Session) -> bool:
    """Whether the integer program chooses the bit-widths of tables."""
    settings = session.config.embeddings
    return settings is not None and settings.bits == AUTO


def fixed(session: Session) -> StepSpec | None:
    """The step that quantizes all tables alike; None if tables stay float or their bit-widths depend on the budget."""
    return None if session.config.embeddings is None or are_chosen(session) else spec(session)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    module = context.model(inputs.model).module
    found = find_tables(module, params.smallest)
    tables, files = {}, {}
    for index, name in enumerate(found.tables):
        table = module.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        bits = params.bits if isinstance(params.bits, int) else params.bits[name]
        tables[name] = quantize_table(name, table, bits, params.percentiles)
        files[f"{name}.safetensors"] = tensors_bytes(tables[name].tensors())
        progress(index + 1, len(found.tables))
    return {**files, "embeddings.json": json_bytes(tables_json(found, tables))}


STEP = Step("embeddings", 1, Params, Inputs, run)
