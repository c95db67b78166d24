"""Compressed models with random codes of every form, and folders that hold them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import save
from mlorq.codecs.affine import QuantizedMatrix
from mlorq.codecs.trellis import FEWEST_ROWS, TrellisMatrix
from mlorq.forms.base import Candidate
from mlorq.forms.embedding_tables import quantize_table, replace_tables
from mlorq.forms.modules import replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.kinds import kind_of, known_kind

TABLE_BITS = (2, 3, 4, 8)


def affine(rows: int, columns: int, bits: int, seed: int, *, wide: bool = False) -> QuantizedMatrix:
    """Random codes with values of about unit norm per row; zero-points outside the codes if ``wide``."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (0.5 + torch.rand(rows, generator=generator)) / 2**bits / columns**0.5
    lowest, highest = (-20, 2**bits + 20) if wide else (0, 2**bits)
    zero = torch.randint(lowest, highest, (rows,), generator=generator)
    return QuantizedMatrix(codes, scale.half(), zero.to(torch.int16 if wide else torch.uint8), bits)


def trellis(rows: int, columns: int, bits: int, seed: int, *, rotation: int = 5) -> TrellisMatrix:
    """Random trellis codes; rows of zeros occur."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (columns, rows), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, 60, (rows,), generator=generator, dtype=torch.uint8)
    scale[seed % rows] = 255
    return TrellisMatrix(codes, scale, torch.tensor([columns**-0.5]), torch.tensor([rotation], dtype=torch.int32), bits)


def random_layer(name: str, module: nn.Module, index: int) -> CompressedLayer:
    """A layer in one of the forms, by its index."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = known_kind(module).matrix_shape(weight.shape)
    kind, most = index % 7, min(rows, columns)
    factored = most > 4 and getattr(module, "groups", 1) == 1
    if kind in (0, 1) and factored:
        rank = 2 if kind else most - 1
        candidate = Candidate("LR", bits_a=4, bits_b=8, rank=rank)
        return CompressedLayer(
            name, candidate, {"a": affine(rows, rank, 4, index), "b": affine(rank, columns, 8, index + 1)}
        )
    if kind == 2 and factored:
        candidate = Candidate("QLR", bits=3, bits_a=4, bits_b=4, rank=2)
        factors = {"a": affine(rows, 2, 4, index), "b": affine(2, columns, 4, index + 1)}
        return CompressedLayer(name, candidate, {"weight": affine(rows, columns, 3, index), **factors})
    if kind in (3, 4) and rows >= FEWEST_ROWS:
        bits = 1 + index % 6
        coded = trellis(rows, columns, bits, index, rotation=-1 if kind == 3 else 5)
        return CompressedLayer(name, Candidate("TCQ", bits=bits), {"weight": coded})
    bits = 1 + index % 8
    return CompressedLayer(
        name, Candidate("Q", bits=bits), {"weight": affine(rows, columns, bits, index, wide=kind == 5)}
    )


def compressed(module: nn.Module, *, tables: bool = True) -> nn.Module:
    """A copy of a model with all linear layers and convolutions compressed, and its embedding tables if ``tables``."""
    result = deepcopy(module)
    layers = {
        name: child
        for name, child in result.named_modules()
        if (kind := kind_of(child)) is not None and type(child).forward is kind.layer.forward
    }
    replace_layers(
        result, {name: random_layer(name, child, index) for index, (name, child) in enumerate(layers.items())}
    )
    if tables:
        found = [(name, child) for name, child in result.named_modules() if type(child) is nn.Embedding]
        bits = {name: TABLE_BITS[index % len(TABLE_BITS)] for index, (name, _) in enumerate(found)}
        replace_tables(result, {name: quantize_table(name, child, bits[name], [1.0]) for name, child in found})
    return result.eval()


def folder_of(path: Path, module: nn.Module, architecture: dict[str, Any], **description: Any) -> Path:
    """A checkpoint's folder."""
    save(checkpoint_files(module, {"architecture": architecture, **description}), path)
    return path
