"""The compiled loops of trellis codes: nanoseconds a weight, by number of bits and width of the processor's vectors.

    .venv/bin/python benchmarks/viterbi_loops.py [--other PATH/TO/_viterbi.abi3.so]

``--other``: the same extension of another state, for instance before a change: both in one run, with equal codes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from typing import Any

import numpy as np

from mlorq.codecs.trellis import MOST_BITS, tables

ROWS, COLUMNS = 384, 16
TURNS = 5


def loaded(path: str) -> Any:
    """The extension in a file."""
    spec = importlib.util.spec_from_file_location("_viterbi", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(module: Any, bits: int) -> tuple[float, float, bytes]:
    """Nanoseconds a weight of ``round_block`` and ``descend_block``, least of some turns, and all that they wrote."""
    rng = np.random.default_rng(bits)
    values = rng.standard_normal((COLUMNS, ROWS)).astype(np.float32)
    square = rng.standard_normal((COLUMNS, 2 * COLUMNS)).astype(np.float32)
    hessian = square @ square.T / (2 * COLUMNS)
    weights = (rng.random(ROWS) + 0.5).astype(np.float32)
    table = np.ascontiguousarray(tables()[bits - 1])
    seconds: list[list[float]] = [[], []]
    written = b""
    for _ in range(TURNS):
        states = np.zeros(values.shape, np.uint16)
        coded, result = np.zeros_like(values), np.zeros_like(values)
        for spent, block, own, matrix in (
            (seconds[0], module.round_block, values.copy(), np.triu(hessian).copy()),
            (seconds[1], module.descend_block, 0.1 * values, hessian),
        ):
            started = time.thread_time()
            block(own, matrix, weights, table, bits, states, coded, result)
            spent.append(time.thread_time() - started)
        written = states.tobytes() + coded.tobytes() + result.tobytes()
    first, second = (min(spent) / values.size * 1e9 for spent in seconds)
    return first, second, written


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--other")
    arguments = parser.parse_args()
    ours = importlib.import_module("mlorq.fitting._viterbi")
    other = loaded(arguments.other) if arguments.other else None
    widths = []
    for lanes in (4, 8, 16):
        try:
            ours.use_lanes(lanes)
        except ValueError:
            continue
        widths.append(lanes)
    names = [f"{lanes} floats" for lanes in widths] + (["other"] if other else [])
    print(f"| bits | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for bits in range(1, MOST_BITS + 1):
        found = []
        for lanes in widths:
            ours.use_lanes(lanes)
            found.append(measured(ours, bits))
        found += [measured(other, bits)] if other else []
        assert len({written for _, _, written in found}) == 1, "the codes differ"
        print(f"| {bits} | {' | '.join(f'{first:.0f}, {second:.0f}' for first, second, _ in found)} |")


if __name__ == "__main__":
    main()
