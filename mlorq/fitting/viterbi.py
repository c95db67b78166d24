"""Viterbi coding of the columns of a matrix (docs/TRELLIS.md): compiled loops, or the same ones in NumPy.

A column's codes are the path through the trellis of least weighted squared error. Columns follow one another, since the
error of each is spread over the later ones, as in ``mlorq.fitting.gptq``. ``_viterbi.c`` and this file do the same
single-precision operations in the same order and give the same codes; the compiled loops are some forty times
faster. They are missing where the package was installed from source without a C compiler. ``viterbi_kernels`` has the
same operations for CUDA.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlorq.codecs.trellis import STATE_BITS, tables
from mlorq.fitting.cuda import has_kernels

Floats = NDArray[np.float32]
States = NDArray[np.uint16]
Block = Callable[[Floats, Floats, Floats, Floats, int, States, Floats, Floats], None]
TensorBlock = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor], None]

STATES = 1 << STATE_BITS
WINDOW = 64  # steps to either side of the edge in the pass that finds it
RENORMALISE = 32  # steps between subtractions of the least path metric, which keep it precise
UNREACHABLE = np.float32(1e30)

_comparing = Lock()


class TensorFunctions(NamedTuple):
    """``round_block`` and ``descend_block`` on contiguous tensors; states are int16.

    Attributes:
        device: where their tensors have to be.
    """

    round_block: TensorBlock
    descend_block: TensorBlock
    device: torch.device


def tensor_functions(device: torch.device, bits: int) -> TensorFunctions:
    """For weights on ``device`` and k bits: Triton kernels if available, else the loops on the CPU.

    At the first call for a device and k, both code a small block. If the kernels fail or give other codes than the CPU,
    a ``RuntimeWarning`` says so, and the CPU is used.
    """
    with _comparing:  # threads that come at the same time wait for one answer
        return _tensor_functions(device, bits)


@cache
def _tensor_functions(device: torch.device, bits: int) -> TensorFunctions:
    round_arrays, descend_arrays = block_functions()
    on_cpu = TensorFunctions(_with_arrays(round_arrays), _with_arrays(descend_arrays), torch.device("cpu"))
    if not has_kernels(device):
        return on_cpu
    try:
        module = import_module("mlorq.fitting.viterbi_kernels")
        kernels = TensorFunctions(module.round_block, module.descend_block, device)
        reason = None if _coded_sample(kernels, bits) == _coded_sample(on_cpu, bits) else "they give other codes"
    except Exception as error:  # of a compiler, a driver, or a version of Triton that nobody has tried
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return kernels
    warnings.warn(
        f"trellis codes of {bits} bits are computed on the CPU, not by the kernels for {device}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return on_cpu


def _with_arrays(block: Block) -> TensorBlock:
    def on_tensors(
        values: Tensor,
        matrix: Tensor,
        weights: Tensor,
        table: Tensor,
        bits: int,
        states: Tensor,
        coded: Tensor,
        results: Tensor,
    ) -> None:
        given = (values.numpy(), matrix.numpy(), weights.numpy(), table.numpy())
        block(*given, bits, states.numpy().view(np.uint16), coded.numpy(), results.numpy())

    return on_tensors


def _coded_sample(functions: TensorFunctions, bits: int) -> list[list[list[float]]]:
    """States and values of a small random block after each of the functions."""
    columns, rows = 3, 80  # paths of some steps more than between renormalisations
    rng = np.random.default_rng(bits)
    matrix = np.triu(rng.standard_normal((columns, columns)) / 4, 1) + np.eye(columns)
    weights, numbers = rng.random(rows), rng.standard_normal((2, columns, rows))
    found = []
    values, shares, row_weights, table = (
        torch.from_numpy(part.astype(np.float32)).to(functions.device)
        for part in (numbers, matrix, weights, tables()[bits - 1])
    )
    states = torch.zeros((columns, rows), dtype=torch.int16, device=functions.device)
    coded, results = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for block, own in zip((functions.round_block, functions.descend_block), values, strict=True):
        block(own, shares, row_weights, table, bits, states, coded, results)
        found += [part.tolist() for part in (states, coded, results)]
    return found


@cache
def block_functions() -> tuple[Block, Block]:
    """``round_block`` and ``descend_block``: the compiled ones if this installation has them."""
    try:
        compiled = import_module("mlorq.fitting._viterbi")
    except ImportError:
        warnings.warn(
            "trellis codes are computed by NumPy, which takes some forty times longer than the compiled loops: "
            "install a C compiler, and then mlorq again",
            RuntimeWarning,
            stacklevel=2,
        )
        return round_block, descend_block
    return compiled.round_block, compiled.descend_block


def compiled_is_right(bits: int) -> bool:
    """Whether the compiled loops, if there are any, code a small block of k bits as NumPy does."""
    compiled, in_numpy = (
        TensorFunctions(_with_arrays(rounding), _with_arrays(descent), torch.device("cpu"))
        for rounding, descent in (block_functions(), (round_block, descend_block))
    )
    return _coded_sample(compiled, bits) == _coded_sample(in_numpy, bits)


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
    """Code the columns of one block again, each to its best codes given all other columns and its cycle's edge.

    Args:
        slope: ``(columns, rows)``, half the gradient with respect to the values; overwritten.
        hessian: ``(columns, columns)`` of the block.
        weights, table, bits: as for ``round_block``.
        states, coded: ``(columns, rows)``, updated in place.
        moves: ``(columns, rows)``, written: changes of the values.
    """
    for column, own in enumerate(slope):
        target = coded[column] - own / hessian[column, column]
        states[column] = _best_path(target, weights, table, bits, int(states[column, -1]) & ((STATES >> bits) - 1))
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
