"""Accounting against tensors that are really packed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from mlorq.codecs.affine import ZeroPoint
from mlorq.codecs.packing import pack_rows
from mlorq.forms.base import Candidate
from mlorq.forms.memory import (
    candidate_bytes,
    low_rank_bytes,
    matrix_bytes,
    stored_matrices,
)

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
        assert matrix_bytes(m, n, bits, zero_point) == tensors_of_matrix(m, n, bits, zero_point)
        expected = tensors_of_matrix(m, n, bits, zero_point)
        assert candidate_bytes(Candidate("Q", bits=bits), m, n, "exact", zero_point) == expected
        other = rng.choice((2, 4, 8))
        low_rank = Candidate("LR", bits_a=bits, bits_b=other, rank=rank)
        expected = tensors_of_matrix(m, rank, bits, zero_point)
        expected += tensors_of_matrix(rank, n, other, zero_point)
        assert candidate_bytes(low_rank, m, n, "exact", zero_point) == expected


def test_paper_bytes_are_the_bits_of_the_codes() -> None:
    assert candidate_bytes(Candidate("Q", bits=3), 5, 7, "paper", "int16") == math.ceil(5 * 7 * 3 / 8)
    # Widths belong to their own bits: A has m rows, B has n columns.
    low_rank = Candidate("LR", bits_a=8, bits_b=4, rank=3)
    assert candidate_bytes(low_rank, 100, 10, "paper", "codes") == math.ceil(3 * (100 * 8 + 10 * 4) / 8)
    assert candidate_bytes(low_rank, 10, 100, "paper", "codes") == math.ceil(3 * (10 * 8 + 100 * 4) / 8)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("accounting", ["exact", "paper"])
def test_arrays_agree_with_single_candidates(accounting: str, zero_point: ZeroPoint) -> None:
    ranks = np.arange(2, 50)
    for bits_a, bits_b in ((4, 8), (8, 4), (6, 6), (3, 5)):
        sizes = low_rank_bytes(ranks, bits_a, bits_b, 37, 51, accounting, zero_point)  # type: ignore[arg-type]
        assert sizes.dtype == np.int64
        for rank, size in zip(ranks, sizes, strict=True):
            candidate = Candidate("LR", bits_a=bits_a, bits_b=bits_b, rank=int(rank))
            assert size == candidate_bytes(candidate, 37, 51, accounting, zero_point)  # type: ignore[arg-type]


def test_matrix_bytes_broadcasts_and_does_not_overflow() -> None:
    rows, columns = [1, 3, 2**31], [5, 8, 2**20]
    sizes = matrix_bytes(np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64), 3, "codes")
    assert sizes.tolist() == [matrix_bytes(r, c, 3, "codes") for r, c in zip(rows, columns, strict=True)]


def test_stored_matrices_and_incomplete_candidates() -> None:
    assert stored_matrices(Candidate("Q", bits=4), 6, 9) == {"weight": (6, 9, 4)}
    low_rank = Candidate("LR", bits_a=4, bits_b=8, rank=2)
    assert stored_matrices(low_rank, 6, 9) == {"a": (6, 2, 4), "b": (2, 9, 8)}
    both = Candidate("QLR", bits=3, bits_a=4, bits_b=8, rank=2)
    assert stored_matrices(both, 6, 9) == {"weight": (6, 9, 3), "a": (6, 2, 4), "b": (2, 9, 8)}
    for bad in (
        Candidate("QLR", bits=3),
        Candidate("Q", bits=3, bits_a=4, bits_b=4, rank=2),
        Candidate("Q"),
        Candidate("LR", bits=4),
        Candidate("LR", bits_a=4, rank=2),
    ):
        with pytest.raises(ValueError, match="incomplete"):
            candidate_bytes(bad, 6, 9, "exact", "codes")
