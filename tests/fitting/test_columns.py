"""The compiled loops over columns against those in torch, in exact arithmetic and on real numbers."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor

from mlorq.fitting import gptq
from mlorq.fitting.gptq import RowHessian, refit_scale
from mlorq.fitting.scale_search import search_quantizer

compiled = pytest.importorskip("mlorq.fitting._columns", reason="the compiled loops are not installed")

# Entries of which a float32 holds all sums and products exactly: no order of operations matters.
COLUMNS = 7


def exact_block(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, an upper triangular matrix of unit pivots, scales and zero-points of a block of columns."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    values = whole(-64, 64, COLUMNS, rows) / 8 + 1 / 16  # halfway between codes in no case
    matrix = (whole(-2, 3, COLUMNS, COLUMNS) / 2).triu(1) + torch.eye(COLUMNS)
    return values, matrix, 2.0 ** whole(-1, 2, rows), whole(0, 8, rows)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_gptq_in_exact_arithmetic(rows: int) -> None:
    values, matrix, scale, zero = exact_block(rows, rows)
    expected = [torch.zeros_like(values) for _ in range(2)]
    gptq.gptq_block(values.clone(), matrix, scale, zero, 7, *expected)
    found = [torch.zeros_like(values) for _ in range(2)]
    block, _ = gptq._block_functions(values)
    assert block is not gptq.gptq_block
    block(values, matrix, scale, zero, 7, *found)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if rows >= 63:
        assert {0.0, 7.0} < set(found[0].unique().tolist()), "codes at both ends and between"


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_descent_in_exact_arithmetic(rows: int) -> None:
    slope, upper, scale, zero = exact_block(rows, rows)
    matrix = upper + upper.triu(1).T
    start = torch.randint(0, 8, slope.shape, generator=torch.Generator().manual_seed(rows)).float()
    expected, moves = start.clone(), torch.zeros_like(slope)
    gptq.descend_block(slope.clone(), matrix, scale, zero, 7, expected, moves)
    found, own = start.clone(), torch.zeros_like(slope)
    _, block = gptq._block_functions(slope)
    block(slope, matrix, scale, zero, 7, found, own)
    assert torch.equal(found, expected)
    assert torch.equal(own, moves)
    assert not torch.equal(found, start)


def test_nothing_is_rounded_out_of_range_by_large_values() -> None:
    values = torch.tensor([[1e9, -1e9, 3e38, -3e38]])
    codes, errors = torch.zeros_like(values), torch.zeros_like(values)
    block, _ = gptq._block_functions(values)
    block(values, torch.ones(1, 1), torch.ones(4), torch.full((4,), 3.0), 15, codes, errors)
    assert codes.tolist() == [[15, 0, 15, 0]]
    assert torch.isfinite(errors).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_on_real_numbers_are_as_good(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(90, 150, generator=generator)
    inputs = torch.randn(400, 150, generator=generator) @ torch.randn(150, 150, generator=generator)
    hessian = RowHessian(inputs.T.double() @ inputs.double() / 400)
    quantizer = search_quantizer(weight, bits, (0.99, 1.0))

    def both() -> tuple[Tensor, list[float]]:
        codes = gptq.gptq(weight, hessian, quantizer)
        found = [codes, gptq.descend(weight, hessian, quantizer, codes)]
        return found[1], [float(refit_scale(weight, hessian, quantizer, one)[1].sum()) for one in found]

    codes, errors = both()
    monkeypatch.setattr(gptq, "_compiled", lambda: None)
    plain, expected = both()
    assert (codes == plain).float().mean() > 0.99  # some values lie at a tie up to rounding
    assert errors == pytest.approx(expected, rel=1e-2)
    assert errors[1] <= errors[0]


def test_arrays_that_do_not_fit_are_refused() -> None:
    values, codes = np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32)
    rows = np.ones(5, np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        compiled.gptq_block(values, np.eye(3, dtype=np.float32), rows, rows, 7, codes, codes.copy())
    with pytest.raises(ValueError, match="do not fit"):
        compiled.descend_block(values, np.eye(2, dtype=np.float32), rows[:4], rows, 7, codes, codes.copy())


def test_without_the_compiled_loops_torch_does_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    gptq._compiled.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    assert gptq._block_functions(torch.zeros(1)) == (gptq.gptq_block, gptq.descend_block)
    monkeypatch.undo()
    gptq._compiled.cache_clear()
    assert gptq._block_functions(torch.zeros(1))[0] is not gptq.gptq_block
