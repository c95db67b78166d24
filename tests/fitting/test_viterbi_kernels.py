"""The GPU kernels of the trellis encoder against NumPy in Triton's interpreter, and the comparison at their first use.

Without a GPU, the kernels run with Triton installed and ``TRITON_INTERPRET=1`` in the environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlorq.codecs.trellis import MOST_BITS, tables
from mlorq.fitting import viterbi
from mlorq.fitting.trellis import TrellisFit
from tests.fitting.test_trellis_fit import covariance, weight_of

CPU = torch.device("cpu")
NAMES = ("round_block", "descend_block")

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and TRITON_INTERPRET=1 in the environment",
)


@pytest.fixture
def compared_again() -> Iterator[None]:
    """Forgets which kernels have been compared, before and after the test."""
    viterbi._tensor_functions.cache_clear()
    yield
    viterbi._tensor_functions.cache_clear()


def arguments(bits: int, rows: int, columns: int) -> list[Any]:
    """Of either function, with some rows that do not count and equal values in others."""
    rng = np.random.default_rng(100 * rows + bits)
    values = rng.standard_normal((columns, rows)).astype(np.float32)
    values[:, rows // 2] = values[:, 1]
    matrix = (np.triu(rng.standard_normal((columns, columns))) * 0.1 + np.eye(columns)).astype(np.float32)
    weights = (rng.random(rows) ** 4).astype(np.float32)
    weights[: rows // 4] = 0
    table = np.ascontiguousarray(tables()[bits - 1])
    states = rng.integers(0, viterbi.STATES, values.shape).astype(np.int16)
    parts = [values, matrix, weights, table, states, table[states], np.zeros_like(values)]
    tensors: list[Any] = [torch.from_numpy(part) for part in parts]
    tensors.insert(4, bits)
    return tensors


def after(block: Callable[..., None], given: list[Any]) -> list[Tensor]:
    """What the function has written: values, states, coded values, and errors or moves."""
    own = [part.clone() if isinstance(part, Tensor) else part for part in given]
    block(*own)
    return [own[0], *own[5:]]


@interpreted
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bits", "rows", "columns"),
    [*((bits, 45, 3) for bits in range(1, MOST_BITS + 1)), (1, 12, 1), (2, 140, 2), (3, 13, 20)],
)
def test_kernels_give_the_codes_of_numpy(bits: int, rows: int, columns: int, name: str) -> None:
    from mlorq.fitting import viterbi_kernels

    given = arguments(bits, rows, columns)
    plain = viterbi._with_arrays(getattr(viterbi, name))
    for found, expected in zip(after(getattr(viterbi_kernels, name), given), after(plain, given), strict=True):
        assert torch.equal(found, expected)


@interpreted
@pytest.mark.usefixtures("compared_again")
def test_a_layer_coded_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlorq.fitting import viterbi_kernels

    fit, weight = TrellisFit(covariance(5, 1), covariance(30, 2), 0), weight_of(30, 5, 3)
    expected = fit.codes_of_widths(weight, [2, 3])
    viterbi._tensor_functions.cache_clear()
    monkeypatch.setattr(viterbi, "has_kernels", lambda device: True)
    assert viterbi.tensor_functions(CPU, 2).round_block is viterbi_kernels.round_block
    for found, other in zip(fit.codes_of_widths(weight, [2, 3]), expected, strict=True):
        assert all(torch.equal(found.tensors()[part], other.tensors()[part]) for part in found.tensors())


def use_as_kernels(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> SimpleNamespace:
    """Let the module of kernels have these functions, and those of NumPy for the others."""
    own = {name: viterbi._with_arrays(getattr(viterbi, name)) for name in NAMES} | functions
    module = SimpleNamespace(**own)
    monkeypatch.setattr(viterbi, "has_kernels", lambda device: True)
    monkeypatch.setitem(sys.modules, "mlorq.fitting.viterbi_kernels", module)
    return module


@pytest.mark.usefixtures("compared_again")
def test_kernels_that_agree_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = use_as_kernels(monkeypatch)
    functions = viterbi.tensor_functions(CPU, 3)
    assert functions[:2] == (module.round_block, module.descend_block)


@pytest.mark.usefixtures("compared_again")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["raises", "one other state", "one other error"])
def test_kernels_that_fail_or_differ_are_not_used(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = viterbi._with_arrays(getattr(viterbi, name))

    def faulty(*given: Any) -> None:
        calls.append(fault)
        plain(*given)
        if fault == "raises":
            raise ValueError("out of registers")
        if fault == "one other state":
            given[5][-1, -1] ^= 1
        else:
            given[7][0, 0] += 1e-3

    use_as_kernels(monkeypatch, **{name: faulty})
    reason = "ValueError: out of registers" if fault == "raises" else "they give other codes"
    with pytest.warns(RuntimeWarning, match=f"3 bits are computed on the CPU.*{reason}") as caught:
        functions = viterbi.tensor_functions(CPU, 3)
    assert len(caught) == 1
    fit, weight = TrellisFit(covariance(5, 1), covariance(30, 2), 0), weight_of(30, 5, 3)
    codes = fit.codes(weight, 3)  # no second warning, which would be an error here
    assert viterbi.tensor_functions(CPU, 3) is functions
    assert len(calls) == 1
    monkeypatch.undo()
    viterbi._tensor_functions.cache_clear()
    assert torch.equal(fit.codes(weight, 3).codes, codes.codes)
