"""Packed rows against a bit writer that goes one bit at a time."""

from __future__ import annotations

import math

import pytest
import torch

from mlorq.codecs import packing
from mlorq.codecs.packing import pack_rows, packed_columns, unpack_rows

torch.set_num_threads(1)

WIDTHS = range(1, 9)
COLUMNS = (1, 2, 3, 7, 8, 9, 13, 16, 17, 31, 64, 127)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def naive_pack(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """Oracle: the row as one Python integer, little-endian."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (index * bits) for index, code in enumerate(row))
        rows.append(list(stream.to_bytes(math.ceil(len(row) * bits / 8), "little")))
    return rows


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_matches_bit_writer_and_round_trips(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits, seed=100 * bits + columns)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == naive_pack(codes, bits)
    assert torch.equal(unpack_rows(packed, columns, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes(bits: int) -> None:
    """All ones shows a bit that leaks into a neighbour; a single largest code shows one that is lost."""
    full = torch.full((2, 11), 2**bits - 1, dtype=torch.uint8)
    assert pack_rows(full, bits).tolist() == naive_pack(full, bits)
    assert torch.equal(unpack_rows(pack_rows(full, bits), 11, bits), full)
    for column in range(11):
        single = torch.zeros((1, 11), dtype=torch.uint8)
        single[0, column] = 2**bits - 1
        assert torch.equal(unpack_rows(pack_rows(single, bits), 11, bits), single)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_are_dense(bits: int, columns: int) -> None:
    assert packed_columns(columns, bits) == math.ceil(columns * bits / 8)
    packed = pack_rows(random_codes(3, columns, bits, seed=columns), bits)
    assert packed.shape == (3, math.ceil(columns * bits / 8))
    assert packed.untyped_storage().nbytes() == packed.numel()


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_chunks_do_not_change_the_result(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(23, 37, bits, seed=bits)
    whole = pack_rows(codes, bits)
    for chunk in (1, 37 * 2, 37 * 5 + 3):
        monkeypatch.setattr(packing, "CHUNK_CODES", chunk)
        assert torch.equal(pack_rows(codes, bits), whole)
        assert torch.equal(unpack_rows(whole, 37, bits), codes)


def test_results_do_not_share_memory_with_arguments() -> None:
    codes = random_codes(4, 16, 8, seed=0)
    packed = pack_rows(codes, 8)
    packed.zero_()
    assert codes.any()
    unpacked = unpack_rows(packed, 16, 8)
    unpacked.fill_(7)
    assert not packed.any()


def test_strided_and_empty_matrices() -> None:
    codes = random_codes(9, 14, 3, seed=1)
    assert torch.equal(pack_rows(codes.T, 3), pack_rows(codes.T.contiguous(), 3))
    assert pack_rows(codes[:0], 3).shape == (0, packed_columns(14, 3))
    assert pack_rows(codes[:, :0], 3).shape == (9, 0)
    assert unpack_rows(torch.empty((9, 0), dtype=torch.uint8), 0, 3).shape == (9, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bits", WIDTHS)
def test_gpu_gives_the_same_bytes(bits: int) -> None:
    codes = random_codes(33, 77, bits, seed=bits)
    packed = pack_rows(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), pack_rows(codes, bits))
    assert torch.equal(unpack_rows(packed, 77, bits).cpu(), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_code_out_of_range_is_an_error(bits: int) -> None:
    codes = torch.zeros((2, 3), dtype=torch.uint8)
    codes[1, 2] = 2**bits
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit {bits} bits"):
        pack_rows(codes, bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_wrong_width_is_an_error(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack_rows(torch.zeros((1, 1), dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack_rows(torch.zeros((1, 1), dtype=torch.uint8), 1, bits)


def test_wrong_sizes_and_types_are_errors() -> None:
    with pytest.raises(ValueError, match="take 3 bytes per row, not 4"):
        unpack_rows(torch.zeros((2, 4), dtype=torch.uint8), 8, 3)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack_rows(torch.zeros((2, 4)), 3)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack_rows(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="uint8 matrix"):
        unpack_rows(torch.zeros((2, 4), dtype=torch.int16), 8, 4)
    with pytest.raises(ValueError, match="-1 columns"):
        packed_columns(-1, 3)
