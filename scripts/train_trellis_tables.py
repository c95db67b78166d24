"""Train the values of the states of trellis codes: writes mlorq/codecs/trellis_tables.npy (docs/TRELLIS.md).

    .venv/bin/python scripts/train_trellis_tables.py [--output FILE] [--rounds N] [--columns N]

Lloyd's algorithm on Gaussian noise: code the noise, set every value to the mean of the noise that was coded with its
state, repeat. It starts from a random order of the Gaussian's quantiles, trains one table for 2 to 4 bits together, and
continues from it for each number of bits alone. The tables are constants of the format: a change makes stored models
decode to other weights. With the defaults it takes some ten minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from mlorq.codecs.trellis import MOST_BITS
from mlorq.fitting.viterbi import STATES, Floats, States, block_functions

LENGTH = 1024  # weights per cycle: the ends do not matter
TOGETHER = (2, 3, 4)
FEWEST = 3  # samples of a state below which its value is kept
BLOCK = 64  # columns coded in one call


def coded_states(noise: Floats, table: Floats, bits: int) -> States:
    """The states of independent columns, ``(columns, LENGTH)``."""
    round_block, _ = block_functions()
    states = np.empty(noise.shape, np.uint16)
    weights, values, errors = np.ones(noise.shape[1], np.float32), np.empty_like(noise), np.empty_like(noise)
    for start in range(0, len(noise), BLOCK):
        own = slice(start, start + BLOCK)
        columns = len(noise[own])
        none = np.eye(columns, dtype=np.float32)  # no column is compensated for another
        round_block(noise[own].copy(), none, weights, table, bits, states[own], values[own], errors[own])
    return states


def trained(table: Floats, bits: tuple[int, ...], rounds: int, columns: int, seed: int) -> Floats:
    """The table after ``rounds`` of Lloyd's algorithm on ``columns`` new columns of noise per number of bits."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        total, count = np.zeros(STATES), np.zeros(STATES)
        for width in bits:
            noise = rng.standard_normal((columns, LENGTH)).astype(np.float32)
            states = coded_states(noise, table, width).ravel()
            count += np.bincount(states, minlength=STATES)
            total += np.bincount(states, noise.ravel().astype(float), minlength=STATES)
        table = np.where(count > FEWEST, total / np.maximum(count, 1), table).astype(np.float32)
    return table


def error(table: Floats, bits: int) -> float:
    """Mean squared error on noise that the table was not trained on."""
    noise = np.random.default_rng(99).standard_normal((128, LENGTH)).astype(np.float32)
    return float(((noise - table[coded_states(noise, table, bits)]) ** 2).mean())


def main() -> None:
    """Train all tables and write them as float16."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    home = Path(__file__).parents[1] / "mlorq" / "codecs" / "trellis_tables.npy"
    parser.add_argument("--output", type=Path, default=home)
    parser.add_argument("--rounds", type=int, default=40, help="rounds per number of bits")
    parser.add_argument("--columns", type=int, default=1500, help=f"columns of {LENGTH} weights per round")
    arguments = parser.parse_args()
    quantiles = ndtri((np.random.default_rng(1).permutation(STATES) + 0.5) / STATES).astype(np.float32)
    start = trained(quantiles, TOGETHER, max(1, 2 * arguments.rounds // 5), max(1, 2 * arguments.columns // 5), 1)
    tables = []
    for bits in range(1, MOST_BITS + 1):
        table = trained(start, (bits,), arguments.rounds, arguments.columns, bits).astype(np.float16)
        print(f"{bits} bits: mean squared error {error(table.astype(np.float32), bits):.6f}", flush=True)
        tables.append(table)
    np.save(arguments.output, np.stack(tables))


if __name__ == "__main__":
    main()
