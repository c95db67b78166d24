"""Dense bit streams: the codes of a row, packed without gaps.

Column ``j`` of a row occupies bits ``[j b, (j + 1) b)`` of the row's stream, least significant bit first;
bit ``i`` of the stream is bit ``i % 8`` of byte ``i // 8``. A row ends on a whole byte and its last, unused
bits are zero, so a row is ``ceil(columns b / 8)`` bytes (METHOD 2, ``exact`` accounting).

Eight codes of ``b`` bits fill exactly ``b`` bytes, hence a code's place inside its group of eight fixes its
byte and shift: packing and unpacking are eight strided operations on whole matrices, for every bit-width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK_CODES = 1 << 22  # codes handled at a time: bounds the temporaries, which are as large as the codes
GROUP = 8


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of one packed row, ``ceil(columns * bits / 8)``.

    Raises:
        ValueError: ``bits`` is not 1 to 8, or ``columns`` is negative.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    if columns < 0:
        raise ValueError(f"a row cannot have {columns} columns")
    return (columns * bits + 7) // 8


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack a matrix of codes row by row.

    Args:
        codes: ``(rows, columns)`` uint8, each below ``2^bits``.
        bits: bit-width of the codes, 1 to 8.

    Returns:
        ``(rows, packed_columns(columns, bits))`` uint8 on the device of ``codes``, a new tensor.

    Raises:
        ValueError: ``codes`` is not a uint8 matrix, a code does not fit ``bits`` bits, or ``bits`` is not 1 to 8.
    """
    _check_matrix(codes, "codes")
    rows, columns = codes.shape
    width = packed_columns(columns, bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    packed = codes.new_empty((rows, width))
    groups = -(-columns // GROUP)
    for part in _row_chunks(rows, columns):
        grouped = pad(codes[part], (0, groups * GROUP - columns)).unflatten(1, (groups, GROUP))
        stream = grouped.new_zeros((grouped.shape[0], groups, bits))  # (rows, groups, bytes of a group)
        for phase, byte, shift in _phases(bits):
            code = grouped[:, :, phase]
            # Mask first: the result must not depend on how uint8 shifts overflow.
            stream[:, :, byte] |= (code & (0xFF >> shift)) << shift
            if shift + bits > 8:
                stream[:, :, byte + 1] |= code >> (8 - shift)
        packed[part] = stream.flatten(1)[:, :width]
    return packed


def unpack_rows(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of ``pack_rows``.

    Args:
        packed: ``(rows, packed_columns(columns, bits))`` uint8.
        columns: codes per row.
        bits: bit-width of the codes, 1 to 8.

    Returns:
        Codes ``(rows, columns)`` uint8 on the device of ``packed``, a new tensor.

    Raises:
        ValueError: ``packed`` is not a uint8 matrix of the width above, or ``bits`` is not 1 to 8.
    """
    _check_matrix(packed, "packed codes")
    rows, width = packed.shape
    if width != packed_columns(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_columns(columns, bits)} bytes per row, not {width}"
        )
    codes = packed.new_empty((rows, columns))
    groups = -(-columns // GROUP)
    mask = (1 << bits) - 1
    for part in _row_chunks(rows, columns):
        stream = pad(packed[part], (0, groups * bits - width)).unflatten(1, (groups, bits))
        grouped = stream.new_empty((stream.shape[0], groups, GROUP))
        for phase, byte, shift in _phases(bits):
            code = stream[:, :, byte] >> shift
            if shift + bits > 8:
                code |= (stream[:, :, byte + 1] & (0xFF >> (8 - shift))) << (8 - shift)
            grouped[:, :, phase] = code & mask
        codes[part] = grouped.flatten(1)[:, :columns]
    return codes


def _phases(bits: int) -> Iterator[tuple[int, int, int]]:
    """Index, byte and shift of each of a group's eight codes."""
    for phase in range(GROUP):
        byte, shift = divmod(phase * bits, 8)
        yield phase, byte, shift


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    if columns == 0:
        return
    step = max(1, CHUNK_CODES // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _check_matrix(tensor: Tensor, what: str) -> None:
    if tensor.dim() != 2 or tensor.dtype != torch.uint8:
        raise ValueError(f"{what} must be a uint8 matrix, not {tensor.dtype} of shape {tuple(tensor.shape)}")
