"""Accounting against tensors that are really packed."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mlorq.codecs.affine import AffineCodec
from mlorq.codecs.base import Accounting, ZeroPoint
from mlorq.codecs.packing import pack_rows
from mlorq.forms.base import Candidate, Shape, enumerate_candidates
from tests.layers import matrices_of, search_config, size_of

torch.set_num_threads(1)

ZERO_POINTS: tuple[ZeroPoint, ...] = ("codes", "int16")


def tensors_of_matrix(rows: int, columns: int, bits: int, zero_point: ZeroPoint) -> int:
    """Oracle: bytes of the tensors that a checkpoint would hold."""
    packed = pack_rows(torch.zeros((rows, columns), dtype=torch.uint8), bits)
    scale = torch.ones(rows, dtype=torch.float16)
    zero = torch.zeros(rows, dtype=torch.uint8 if zero_point == "codes" else torch.int16)
    return packed.nbytes + scale.nbytes + zero.nbytes


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_exact_bytes_are_those_of_the_tensors(bits: int, zero_point: ZeroPoint) -> None:
    rng = random.Random(bits)
    for _ in range(10):
        m, n, rank = rng.randint(1, 40), rng.randint(1, 40), rng.randint(2, 20)
        assert AffineCodec(bits, zero_point).size(m, n) == tensors_of_matrix(m, n, bits, zero_point)
        expected = tensors_of_matrix(m, n, bits, zero_point)
        assert size_of(Candidate("Q", bits=bits), m, n, zero_point=zero_point) == expected
        other = rng.choice((2, 4, 8))
        low_rank = Candidate("LR", bits_a=bits, bits_b=other, rank=rank)
        expected = tensors_of_matrix(m, rank, bits, zero_point)
        expected += tensors_of_matrix(rank, n, other, zero_point)
        assert size_of(low_rank, m, n, zero_point=zero_point) == expected


def test_paper_bytes_are_the_bits_of_the_codes() -> None:
    assert size_of(Candidate("Q", bits=3), 5, 7, "paper", "int16") == math.ceil(5 * 7 * 3 / 8)
    # Widths belong to their own bits: A has m rows, B has n columns.
    low_rank = Candidate("LR", bits_a=8, bits_b=4, rank=3)
    assert size_of(low_rank, 100, 10, "paper", "codes") == math.ceil(3 * (100 * 8 + 10 * 4) / 8)
    assert size_of(low_rank, 10, 100, "paper", "codes") == math.ceil(3 * (10 * 8 + 100 * 4) / 8)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("accounting", ["exact", "paper"])
def test_tables_agree_with_single_candidates(accounting: Accounting, zero_point: ZeroPoint) -> None:
    config = search_config(forms=["Q", "LR", "QLR"], factor_bits=[3, 4, 5, 6, 8], accounting=accounting,
                           zero_point=zero_point)  # fmt: skip
    found = enumerate_candidates(Shape(37, 51), config.form_settings, config.storage)
    assert {candidate.form for candidate, _ in found} == {"Q", "LR", "QLR"}
    for candidate, size in found:
        assert size == size_of(candidate, 37, 51, accounting, zero_point)


def test_sizes_do_not_overflow() -> None:
    rows, columns = 2**31, 2**20
    assert AffineCodec(3).size(rows, columns) == rows * (columns * 3 // 8 + 3)
    assert size_of(Candidate("Q", bits=3), rows, columns) == rows * (columns * 3 // 8 + 3)


def test_stored_matrices_and_incomplete_candidates() -> None:
    assert matrices_of(Candidate("Q", bits=4), 6, 9) == {"weight": (6, 9, 4)}
    low_rank = Candidate("LR", bits_a=4, bits_b=8, rank=2)
    assert matrices_of(low_rank, 6, 9) == {"a": (6, 2, 4), "b": (2, 9, 8)}
    both = Candidate("QLR", bits=3, bits_a=4, bits_b=8, rank=2)
    assert matrices_of(both, 6, 9) == {"weight": (6, 9, 3), "a": (6, 2, 4), "b": (2, 9, 8)}
    for bad in (
        Candidate("QLR", bits=3),
        Candidate("Q", bits=3, bits_a=4, bits_b=4, rank=2),
        Candidate("Q"),
        Candidate("LR", bits=4),
        Candidate("LR", bits_a=4, rank=2),
    ):
        with pytest.raises(ValueError, match="takes"):
            size_of(bad, 6, 9)
