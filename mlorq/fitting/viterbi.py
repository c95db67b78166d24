"""Viterbi coding of the columns of a matrix (docs/TRELLIS.md): compiled loops, or the same ones in NumPy.

A column's codes are the path through the trellis of least weighted squared error. Columns follow one another, since the
error of each is spread over the later ones, as in ``mlorq.fitting.gptq``. ``_viterbi.c`` and this file do the same
single-precision operations in the same order and give the same codes; the compiled loops are about a hundred times
faster. They are missing where the package was installed from source without a C compiler.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from mlorq.codecs.trellis import STATE_BITS

Floats = NDArray[np.float32]
States = NDArray[np.uint16]
Block = Callable[[Floats, Floats, Floats, Floats, int, States, Floats, Floats], None]

STATES = 1 << STATE_BITS
WINDOW = 64  # steps to either side of the edge in the pass that finds it
RENORMALISE = 32  # steps between subtractions of the least path metric, which keep it precise
UNREACHABLE = np.float32(1e30)


@cache
def block_functions() -> tuple[Block, Block]:
    """``round_block`` and ``descend_block``: the compiled ones if this installation has them."""
    try:
        compiled = import_module("mlorq.fitting._viterbi")
    except ImportError:
        warnings.warn(
            "trellis codes are computed by NumPy, which takes about a hundred times longer than the compiled loops: "
            "install a C compiler, and then mlorq again",
            RuntimeWarning,
            stacklevel=2,
        )
        return round_block, descend_block
    return compiled.round_block, compiled.descend_block


def round_block(
    values: Floats,
    shares: Floats,
    weights: Floats,
    table: Floats,
    bits: int,
    states: States,
    coded: Floats,
    errors: Floats,
) -> None:
    """Code the columns of one block, one after another.

    Args:
        values: ``(columns, rows)``, the values to code, compensated for earlier blocks; overwritten.
        shares: ``(columns, columns)``, the block of ``RowHessian.shares``, upper triangular.
        weights: of the squared errors of the rows, ``(rows,)``.
        table: values of the states, ``(4096,)``.
        bits: k.
        states, coded, errors: ``(columns, rows)``, written: states, their values, and errors divided by pivots.
    """
    for column, own in enumerate(values):
        states[column] = best_states(own, weights, table, bits)
        coded[column] = table[states[column]]
        errors[column] = (own - coded[column]) / shares[column, column]
        for later in range(column + 1, len(values)):
            values[later] += -shares[column, later] * errors[column]


def descend_block(
    slope: Floats,
    hessian: Floats,
    weights: Floats,
    table: Floats,
    bits: int,
    states: States,
    coded: Floats,
    moves: Floats,
) -> None:
    """Code the columns of one block again, each to the best codes given all other columns.

    Args:
        slope: ``(columns, rows)``, half the gradient with respect to the values; overwritten.
        hessian: ``(columns, columns)`` of the block.
        weights, table, bits: as for ``round_block``.
        states, coded: ``(columns, rows)``, updated in place.
        moves: ``(columns, rows)``, written: changes of the values.
    """
    for column, own in enumerate(slope):
        target = coded[column] - own / hessian[column, column]
        states[column] = best_states(target, weights, table, bits)
        found = table[states[column]]
        moves[column] = found - coded[column]
        coded[column] = found
        for later in range(column + 1, len(slope)):
            slope[later] += hessian[column, later] * moves[column]


def best_states(values: Floats, weights: Floats, table: Floats, bits: int) -> States:
    """The states of a cyclic path of small weighted squared error, ``(rows,)``.

    Two passes (tail-biting): the first, around the edge of the cycle, finds the bits that its ends share; the second
    is the best path with these bits.

    Args:
        values: ``(rows,)``; ``rows · bits`` at least ``STATE_BITS``.
        weights: of the squared errors, ``(rows,)``.
        table: values of the states.
        bits: k.
    """
    half = min(len(values) // 2, WINDOW)
    around = np.r_[len(values) - half : len(values), :half]
    first = _best_path(values[around], weights[around], table, bits, None)
    return _best_path(values, weights, table, bits, int(first[half - 1]) & ((STATES >> bits) - 1))


def _best_path(values: Floats, weights: Floats, table: Floats, bits: int, edge: int | None) -> States:
    """The states of the best path; ``edge``: the low bits of the state before the first step and of the last one."""
    many, count, steps = 1 << bits, STATES >> bits, len(values)
    survivor = np.zeros(count, np.float32)
    if edge is not None:
        survivor[:] = UNREACHABLE
        survivor[edge] = 0
    metric = np.empty(STATES, np.float32)
    back = np.zeros((steps, count), np.uint8)
    for step in range(steps):
        if step:
            # Non-negative floats are ordered like their bit patterns; the low bits hold the oldest bits of the state.
            patterns = metric.view(np.int32).reshape(many, count) & np.int32(-many)
            least = (patterns | np.arange(many, dtype=np.int32)[:, None]).min(0)
            back[step] = least & (many - 1)
            survivor = least.view(np.float32)
        if step % RENORMALISE == RENORMALISE - 1:
            survivor = survivor - survivor.min()
        error = values[step] - table
        metric = np.repeat(survivor, many) + weights[step] * error * error
    allowed = np.arange(STATES) if edge is None else np.arange(edge, STATES, count)
    state = int(allowed[metric[allowed].argmin()])
    states = np.empty(steps, np.uint16)
    for step in range(steps - 1, -1, -1):
        states[step] = state
        state = int(back[step, state >> bits]) * count + (state >> bits)
    return states
