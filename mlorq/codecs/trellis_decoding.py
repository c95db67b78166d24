"""Decoding of trellis codes in torch, without branches on their values, so that it can be traced (docs/TRELLIS.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from mlorq.codecs.rotation import rotated_back
from mlorq.codecs.trellis import STATE_BITS, scale_values, stream, tables


def states(codes: Tensor, bits: int) -> Tensor:
    """The state of every weight, ``(columns, rows)`` int32, in the order of the stream.

    Args:
        codes: ``(columns, rows)`` uint8, in the order of the stream.
        bits: k.
    """
    before = _before(codes.shape[1]).to(codes.device)
    found: Tensor = codes.int()
    last = found
    for shift in range(bits, STATE_BITS, bits):
        last = last[:, before]
        found = found | (last << shift)
    return torch.bitwise_and(found, 2**STATE_BITS - 1)


def unit(codes: Tensor, rotation: Tensor, bits: int) -> Tensor:
    """The values without scales, ``V`` or ``V Qᵀ``, ``(rows, columns)`` float32.

    Args:
        codes, bits: as for ``states``.
        rotation: how the columns are rotated (``stored_seed``), of one element.
    """
    table, place = _table(bits).to(codes.device), _place(codes.shape[1]).to(codes.device)
    values = table[states(codes, bits).long()][:, place].T.contiguous()
    return rotated_back(values, rotation)


def scales(codes: Tensor, base: Tensor) -> Tensor:
    """The scales of the rows, ``(rows,)`` float32."""
    return torch.mul(_scale_values().to(codes.device)[codes.long()], base)


# Constants of the format; a traced program holds their values.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(bits: int) -> Tensor:
    return torch.from_numpy(tables()[bits - 1])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _before(rows: int) -> Tensor:
    return torch.from_numpy(stream(rows).before)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place(rows: int) -> Tensor:
    return torch.from_numpy(stream(rows).place)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _scale_values() -> Tensor:
    return torch.from_numpy(scale_values())
