"""Step ``embeddings``: the model's embedding tables as codes, where the configuration asks for them."""

from __future__ import annotations

from typing import Any

from torch import nn

from mlorq.artifacts.store import ArtifactRef, json_bytes, tensors_bytes
from mlorq.forms.embedding_tables import find_tables, quantize_table, tables_json
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def spec(bench: Workbench) -> StepSpec:
    """Depends on the model, the bit-width and the ranges that are tried; on no data."""
    settings = bench.config.embeddings
    assert settings is not None, "only where the configuration asks for quantized embeddings"
    params = {**settings.model_dump(), "percentiles": list(bench.config.search.percentiles)}
    return STEP.spec(params, {"model": bench.float_model.key})


def inputs(bench: Workbench) -> dict[str, ArtifactRef | str]:
    """The input of steps that see the quantized tables; nothing, and no other key, where there are none."""
    return {} if bench.config.embeddings is None else {"embeddings": spec(bench).ref}


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    params: dict[str, Any] = spec.params
    module = bench.float_model.module
    found = find_tables(module, params["smallest"])
    tables, files = {}, {}
    for index, name in enumerate(found.tables):
        table = module.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        tables[name] = quantize_table(name, table, params["bits"], params["percentiles"])
        files[f"{name}.safetensors"] = tensors_bytes(tables[name].tensors())
        progress(index + 1, len(found.tables))
    return {**files, "embeddings.json": json_bytes(tables_json(found, tables))}


STEP = Step("embeddings", 1, run)
