"""Embedding tables as packed codes: which are quantized, how, and the module that looks rows up in them.

A table is no layer of the search: a row is read and not multiplied, so that it has no rank worth having and a uniform
bit-width serves it. Each row gets the scale and zero-point with the least squared error (METHOD 1, scale search), and a
look-up dequantizes the rows that it reads and no others. A row of zeros, as padding has, stays exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.codecs.affine import Rounded
from mlorq.codecs.base import Storage
from mlorq.fitting.scale_search import search_quantizer
from mlorq.forms.base import FORMS, Shape, uniform_candidate
from mlorq.forms.modules import compressed_class, get_layer, swap_module
from mlorq.forms.stored_layer import CompressedLayer


@dataclass(frozen=True)
class TableList:
    """The embedding tables of a model.

    Attributes:
        tables: names of those that are quantized, in the model's order.
        skipped: ``(name, reason)`` of those that stay float.
    """

    tables: list[str]
    skipped: list[tuple[str, str]]


def find_tables(module: nn.Module, smallest: int) -> TableList:
    """The embedding tables that can be quantized.

    Args:
        module: the float model.
        smallest: fewest entries of a table that is worth it.
    """
    owners: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        for key, parameter in child._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    tables, skipped = [], []
    for path, child in module.named_modules():
        if not isinstance(child, nn.Embedding) or not path:
            continue
        reason = _why_float(child, path, smallest, owners)
        if reason is None:
            tables.append(path)
        else:
            skipped.append((path, reason))
    return TableList(tables, skipped)


def _why_float(table: nn.Embedding, path: str, smallest: int, owners: Mapping[int, Sequence[str]]) -> str | None:
    if type(table).forward is not nn.Embedding.forward:
        return f"{type(table).__name__} has a forward of its own"
    if "weight" not in table._parameters:
        return "its table is computed at every access"
    if table.max_norm is not None:
        return "max_norm changes its rows when they are read"
    others = [name for name in owners[id(table.weight)] if name != f"{path}.weight"]
    if others:
        return f"its table is also {others[0]}"
    if table.weight.numel() < smallest:
        return f"{table.weight.numel()} entries, fewer than embeddings.smallest = {smallest}"
    return None


def quantize_table(name: str, table: nn.Embedding, bits: int, percentiles: Sequence[float]) -> CompressedLayer:
    """The stored form of a table.

    Args:
        name: of the module.
        table: the float one.
        bits: code width.
        percentiles: upper percentiles of the rows' ranges tried.
    """
    weight = table.weight.detach().float()
    quantizer = search_quantizer(weight, bits, percentiles)
    candidate = uniform_candidate(bits)
    (matrix,) = FORMS[candidate.form].names
    return CompressedLayer.of_rounded(name, candidate, {matrix: Rounded.nearest(weight, quantizer)})


def set_tables(module: nn.Module, tables: Mapping[str, CompressedLayer]) -> None:
    """Put the values that quantized tables give into a model's float tables, in place."""
    for name, table in tables.items():
        weight = module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight.copy_(table.dense())


def replace_tables(module: nn.Module, tables: Mapping[str, CompressedLayer]) -> None:
    """Swap float tables for compressed ones, in place."""
    for name, table in tables.items():
        layer = get_layer(module, name)
        swap_module(module, name, layer, compressed_class(layer, name).from_layer(layer, table))


def tables_json(found: TableList, tables: Mapping[str, CompressedLayer]) -> dict[str, Any]:
    """What a run says of its embedding tables: those that are quantized with their bytes, and the others with why."""
    rows = []
    for name in found.tables:
        table = tables[name]
        (matrix,) = table.matrices.values()
        size = FORMS[table.candidate.form].size(table.candidate, Shape(*matrix.shape), Storage())
        rows.append({"table": name, "shape": list(matrix.shape), "bits": matrix.codec.bits, "bytes": size})
    return {"tables": rows, "skipped": [{"table": name, "reason": reason} for name, reason in found.skipped]}
