"""The functions of ``mlorq.fitting.viterbi`` as a Triton kernel, for CUDA: one program codes the columns of a block.

Every operation is one rounding of single precision in the order of the loops on the CPU (no fused multiply-adds), and
gives the same codes. Path metrics stay in registers, survivors' oldest bits go to global memory. What a thread reads
from there may have been written by another, so that barriers separate writing from reading.

Columns follow one another, and a program occupies one multiprocessor: blocks of different bit-widths run at the same
time, in streams of their own (``TrellisFit.codes_of_widths``).
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlorq.fitting import viterbi

STATES = tl.constexpr(viterbi.STATES)
WINDOW = tl.constexpr(viterbi.WINDOW)
RENORMALISE = tl.constexpr(viterbi.RENORMALISE)
UNREACHABLE = tl.constexpr(float(viterbi.UNREACHABLE))
LARGEST = tl.constexpr(2**31 - 1)
TOGETHER = tl.constexpr(16)  # later columns that get their share of an error at once
WARPS = 8

_launching = Lock()  # a launch may compile; Triton does not promise that threads can do so at the same time


@triton.jit
def _extend(survivor, value, weight, table):  # type: ignore[no-untyped-def]
    """Metrics of all states: those of states ``q · 2^k + i`` in row q, as ``table``."""
    error = value - table
    return survivor[:, None] + weight * error * error


@triton.jit
def _last_state(  # type: ignore[no-untyped-def]
    values, weights, table, back, first, steps, rows, edge, BITS: tl.constexpr
):
    """The last state of the best path over ``steps`` cyclic rows from ``first``; writes ``back``.

    Edge: the low bits of the state before the first step and of the last one, or -1.
    """
    many: tl.constexpr = 1 << BITS
    count: tl.constexpr = STATES >> BITS
    place = tl.arange(0, count)
    oldest = tl.arange(0, many)
    allowed = (place == edge) | (edge < 0)
    survivor = tl.where(allowed, 0.0, UNREACHABLE)
    metric = _extend(survivor, tl.load(values + first), tl.load(weights + first), table)
    for step in range(1, steps):
        # Non-negative floats are ordered like their bit patterns; the low bits hold the oldest bits of the state.
        patterns = tl.reshape(metric, (many, count)).to(tl.int32, bitcast=True) & -many
        least = tl.min(patterns | oldest[:, None], axis=0)
        tl.store(back + step * count + place, (least & (many - 1)).to(tl.uint8))
        survivor = least.to(tl.float32, bitcast=True)
        if tl.cast(step, tl.int32) % RENORMALISE == RENORMALISE - 1:  # a plain integer in Triton's interpreter
            survivor = survivor - tl.min(survivor, axis=0)
        row = (first + step) % rows
        metric = _extend(survivor, tl.load(values + row), tl.load(weights + row), table)
    patterns = tl.reshape(metric, (many, count)).to(tl.int32, bitcast=True)
    patterns = tl.where(allowed[None, :], patterns, LARGEST)
    states = oldest[:, None] * count + place[None, :]
    tl.debug_barrier()
    # Not `argmin` of a flat tensor: Triton lets a reshape before a reduction reorder the values, but not their indices.
    return tl.min(tl.where(patterns == tl.min(patterns), states, STATES))


@triton.jit
def _state_before(state, step, back, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    count: tl.constexpr = STATES >> BITS
    rest = state >> BITS
    return tl.load(back + step * count + rest).to(tl.int32) * count + rest


@triton.jit
def _write_states(  # type: ignore[no-untyped-def]
    values, weights, table, back, states, rows, BITS: tl.constexpr, AGAIN: tl.constexpr
):
    """``mlorq.fitting.viterbi.best_states`` of one column; AGAIN: with the edge of the states that it has."""
    if AGAIN:
        state = tl.load(states + rows - 1).to(tl.int32)
    else:
        half = tl.minimum(rows // 2, WINDOW)
        state = _last_state(values, weights, table, back, rows - half, 2 * half, rows, -1, BITS)
        for index in range(half):
            state = _state_before(state, 2 * half - 1 - index, back, BITS)
    tl.debug_barrier()
    state = _last_state(values, weights, table, back, 0, rows, rows, state & ((STATES >> BITS) - 1), BITS)
    for index in range(rows - 1):
        step = rows - 1 - index
        tl.store(states + step, state.to(tl.int16))
        state = _state_before(state, step, back, BITS)
    tl.store(states, state.to(tl.int16))
    tl.debug_barrier()


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    values,
    matrix,
    weights,
    table,
    back,
    states,
    coded,
    results,
    width,
    rows,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    DESCEND: tl.constexpr,
):
    many: tl.constexpr = 1 << BITS
    count: tl.constexpr = STATES >> BITS
    state_values = tl.load(table + tl.arange(0, count)[:, None] * many + tl.arange(0, many)[None, :])
    row = tl.arange(0, LANES)
    inside = row < rows
    for column in range(width):
        start = column * rows
        own = tl.load(values + start + row, mask=inside, other=0.0)
        pivot = tl.load(matrix + column * width + column)
        if DESCEND:
            before = tl.load(coded + start + row, mask=inside, other=0.0)
            tl.store(results + start + row, before - tl.div_rn(own, pivot), mask=inside)
            tl.debug_barrier()
            _write_states(results + start, weights, state_values, back, states + start, rows, BITS, True)
        else:
            _write_states(values + start, weights, state_values, back, states + start, rows, BITS, False)
        found = tl.load(table + tl.load(states + start + row, mask=inside, other=0).to(tl.int32))
        if DESCEND:
            result = found - before
        else:
            result = tl.div_rn(own - found, pivot)
        tl.store(coded + start + row, found, mask=inside)
        tl.store(results + start + row, result, mask=inside)
        for later in range(column + 1, width, TOGETHER):
            others = later + tl.arange(0, TOGETHER)
            within = others < width
            share = tl.load(matrix + column * width + others, mask=within, other=0.0)
            if not DESCEND:
                share = -share
            at = values + others[:, None] * rows + row[None, :]
            mask = within[:, None] & inside[None, :]
            tl.store(at, tl.load(at, mask=mask, other=0.0) + share[:, None] * result[None, :], mask=mask)
        tl.debug_barrier()


def round_block(
    values: Tensor,
    shares: Tensor,
    weights: Tensor,
    table: Tensor,
    bits: int,
    states: Tensor,
    coded: Tensor,
    errors: Tensor,
) -> None:
    """As ``mlorq.fitting.viterbi.round_block``, on contiguous CUDA tensors; ``states`` are int16."""
    _launch(False, values, shares, weights, table, bits, states, coded, errors)


def descend_block(
    slope: Tensor,
    hessian: Tensor,
    weights: Tensor,
    table: Tensor,
    bits: int,
    states: Tensor,
    coded: Tensor,
    moves: Tensor,
) -> None:
    """As ``mlorq.fitting.viterbi.descend_block``, on contiguous CUDA tensors; ``states`` are int16."""
    _launch(True, slope, hessian, weights, table, bits, states, coded, moves)


def _launch(
    descend: bool,
    values: Tensor,
    matrix: Tensor,
    weights: Tensor,
    table: Tensor,
    bits: int,
    states: Tensor,
    coded: Tensor,
    results: Tensor,
) -> None:
    width, rows = values.shape
    back = torch.empty((rows, viterbi.STATES >> bits), dtype=torch.uint8, device=values.device)
    kernel: Any = _block
    with torch.cuda.device_of(values), _launching:
        kernel[(1,)](
            values,
            matrix,
            weights,
            table,
            back,
            states,
            coded,
            results,
            width,
            rows,
            BITS=bits,
            LANES=triton.next_power_of_2(rows),
            DESCEND=descend,
            num_warps=WARPS,
            num_stages=1,
            enable_fp_fusion=False,
        )
