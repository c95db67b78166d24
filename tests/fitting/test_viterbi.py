"""The encoder of trellis codes: both implementations, optimality, and the error on Gaussian weights."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from mlorq.codecs.trellis import GAUSSIAN_ERRORS, MOST_BITS, STATE_BITS, tables
from mlorq.fitting import viterbi
from mlorq.fitting.viterbi import STATES, best_states

# Mean squared errors of uniform codes and the rate-distortion limit for Gaussian weights, by bits.
UNIFORM = {2: 0.1188, 3: 0.0374, 4: 0.0115}
LIMIT = {bits: 4.0**-bits for bits in range(1, MOST_BITS + 1)}
PROTOTYPE = {2: 0.0746, 3: 0.0197, 4: 0.0053}  # a trellis of 1024 states, one table for all bits

needs_compiled = pytest.mark.skipif(
    importlib.util.find_spec("mlorq.fitting._viterbi") is None, reason="the compiled loops are not installed"
)


def table_of(bits: int) -> np.ndarray:
    return np.ascontiguousarray(tables()[bits - 1])


def run(
    block: viterbi.Block, values: np.ndarray, matrix: np.ndarray, weights: np.ndarray, bits: int
) -> list[np.ndarray]:
    own, states = values.copy(), np.zeros(values.shape, np.uint16)
    coded = table_of(bits)[states]
    errors = np.zeros_like(values)
    block(own, matrix, weights, table_of(bits), bits, states, coded, errors)
    return [own, states, coded, errors]


def valid(states: np.ndarray, bits: int) -> bool:
    """Whether the states are a cyclic path: each shares all but its newest bits with the one before."""
    before = np.roll(states, 1).astype(int)
    return bool(np.all(states >> bits == before & ((STATES >> bits) - 1)))


@pytest.fixture
def lanes(request: pytest.FixtureRequest) -> Iterator[None]:
    """The compiled loops with vectors of so many floats."""
    compiled = importlib.import_module("mlorq.fitting._viterbi")
    try:
        compiled.use_lanes(request.param)
    except ValueError:
        pytest.skip("this processor has no vectors of this width")
    yield
    for width in (4, 8, 16):  # back to the widest
        with contextlib.suppress(ValueError):
            compiled.use_lanes(width)


@needs_compiled
@pytest.mark.parametrize("lanes", [4, 8, 16], indirect=True)
@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
@pytest.mark.parametrize("rows", [12, 45, 150])
@pytest.mark.usefixtures("lanes")
def test_compiled_loops_give_the_codes_of_numpy(bits: int, rows: int) -> None:
    rng = np.random.default_rng(rows + bits)
    values = rng.standard_normal((4, rows)).astype(np.float32)
    matrix = (np.triu(rng.standard_normal((4, 4))) * 0.2 + np.eye(4)).astype(np.float32)
    weights = (rng.random(rows) ** 4 + 1e-6).astype(np.float32)
    weights[0] = 0
    compiled_round, compiled_descend = viterbi.block_functions()
    assert compiled_round is not viterbi.round_block
    for compiled, plain in ((compiled_round, viterbi.round_block), (compiled_descend, viterbi.descend_block)):
        for found, expected in zip(
            run(compiled, values, matrix, weights, bits), run(plain, values, matrix, weights, bits), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


@needs_compiled
def test_compiled_loops_refuse_arrays_that_do_not_fit() -> None:
    values = np.zeros((2, 20), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        run(viterbi.block_functions()[0], values, np.eye(3, dtype=np.float32), np.ones(20, np.float32), 2)


@pytest.mark.parametrize(("bits", "rows"), [(2, 7), (3, 5), (4, 4), (6, 3)])
def test_path_against_all_paths(bits: int, rows: int) -> None:
    """With the bits that the ends share, no other path has less error; over all paths, few do.

    Cycles of practical length are far longer, and their ends matter less.
    """
    rng = np.random.default_rng(bits)
    table = table_of(bits).astype(float)
    symbols = np.array(list(itertools.product(range(2**bits), repeat=rows)))
    state = np.zeros(len(symbols), int)
    path = np.empty((len(symbols), rows), int)
    for _ in range(2 + STATE_BITS // (bits * rows)):  # until the states of the cycle are reached
        for step in range(rows):
            state = (state << bits | symbols[:, step]) & (STATES - 1)
            path[:, step] = state
    for _ in range(5):
        values = rng.standard_normal(rows).astype(np.float32)
        weights = (rng.random(rows) + 0.1).astype(np.float32)
        states = best_states(values, weights, table_of(bits), bits)
        assert valid(states, bits)
        errors = (weights * (values - table[path]) ** 2).sum(1)
        own = float((weights * (values - table[states]) ** 2).sum())
        same_edge = path[:, -1] & ((STATES >> bits) - 1) == int(states[-1]) & ((STATES >> bits) - 1)
        assert own <= errors[same_edge].min() * (1 + 1e-4)
        assert own <= np.quantile(errors, 0.1)


@needs_compiled
@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
def test_error_on_gaussian_weights(bits: int) -> None:
    """Below uniform codes and below the prototype of docs/METHOD.md (10), above the limit, at cycles of 96 rows."""
    values = np.random.default_rng(bits).standard_normal((256, 96)).astype(np.float32)
    block, _ = viterbi.block_functions()
    coded = np.concatenate(
        [
            run(block, part, np.eye(64, dtype=np.float32), np.ones(96, np.float32), bits)[2]
            for part in np.split(values, 4)
        ]
    )
    error = float(((values - coded) ** 2).mean() / (values**2).mean())
    assert error > LIMIT[bits]
    assert error < 1.45 * LIMIT[bits]
    assert error == pytest.approx(GAUSSIAN_ERRORS[bits - 1], rel=0.05)
    if bits in PROTOTYPE:
        assert error < PROTOTYPE[bits]
        assert error < 0.7 * UNIFORM[bits]
