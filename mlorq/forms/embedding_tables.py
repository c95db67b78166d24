"""Embedding tables as packed codes: which are quantized, their fit, and their replacement in a model (METHOD 2).

Rows are read, not multiplied, so that low rank has no use: a table has one bit-width, that of the configuration or one
that the integer program chooses. Each row gets the scale and zero-point of least squared error (METHOD 1), and a
look-up dequantizes only the rows that it reads. A row of zeros, such as padding, stays exactly zero.
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
from mlorq.models.weight_range import why_float


@dataclass(frozen=True)
class TableList:
    """The embedding tables of a model.

    Attributes:
        tables: names of the tables to quantize, in the model's order.
        skipped: ``(name, reason)`` of the tables that stay float.
    """

    tables: list[str]
    skipped: list[tuple[str, str]]


def find_tables(module: nn.Module, smallest: int) -> TableList:
    """The embedding tables of a model, and which of them can be quantized.

    Args:
        module: the float model.
        smallest: tables with fewer entries stay float.
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
    """Reason why a table stays float, or None."""
    if type(table).forward is not nn.Embedding.forward:
        return f"{type(table).__name__} has a forward of its own"
    if "weight" not in table._parameters:
        return "its weight is computed on every access"
    if table.max_norm is not None:
        return "max_norm changes its rows on look-up"
    others = [name for name in owners[id(table.weight)] if name != f"{path}.weight"]
    if others:
        return f"its weight is shared with {others[0]}"
    if table.weight.numel() < smallest:
        return f"{table.weight.numel()} entries, fewer than embeddings.smallest = {smallest}"
    return why_float(table.weight, float16=True)


def quantize_table(name: str, table: nn.Embedding, bits: int, percentiles: Sequence[float]) -> CompressedLayer:
    """Quantize an embedding table with the range of least squared error per row.

    Args:
        name: name of the module.
        table: the float table.
        bits: bit-width of the codes.
        percentiles: upper percentiles p of the ranges (1-p, p) tried.
    """
    weight = table.weight.detach().float()
    quantizer = search_quantizer(weight, bits, percentiles)
    candidate = uniform_candidate(bits)
    (matrix,) = FORMS[candidate.form].names
    return CompressedLayer.of_rounded(name, candidate, {matrix: Rounded.nearest(weight, quantizer)})


def table_size(table: nn.Embedding, bits: int) -> int:
    """Bytes of a table with codes of a bit-width."""
    candidate = uniform_candidate(bits)
    return FORMS[candidate.form].size(candidate, Shape(*table.weight.shape), Storage())


def set_tables(module: nn.Module, tables: Mapping[str, CompressedLayer]) -> None:
    """Set a model's float tables to the dequantized values of quantized ones, in place."""
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
    """Report on embedding tables: bytes of the quantized tables, reasons for the others."""
    rows = []
    for name in found.tables:
        table = tables[name]
        (matrix,) = table.matrices.values()
        size = FORMS[table.candidate.form].size(table.candidate, Shape(*matrix.shape), Storage())
        rows.append({"table": name, "shape": list(matrix.shape), "bits": matrix.codec.bits, "bytes": size})
    return {"tables": rows, "skipped": [{"table": name, "reason": reason} for name, reason in found.skipped]}
