"""Choices of the integer program: candidates of layers, and bit-widths of groups of activations (METHOD 5, 8).

They do not depend on the budget: built once, they are solved at any number of budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlorq.artifacts.schemas import ALLOCATION
from mlorq.costs.pareto import pareto_front
from mlorq.errors import BudgetError
from mlorq.forms.base import FIELDS
from mlorq.numbers import byte_count

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Choices:
    """The candidates of one layer.

    Attributes:
        layer: name of the layer.
        cost: ``(candidates,)`` global costs (``search.cost``).
        size: ``(candidates,)`` bytes, int64.
        load: ``(candidates,)`` bit operations per sample and bit of the layer's input (``weight_load``); None
            if no bit-widths of activations are chosen.
        memory: ``(candidates,)`` bytes in the memory of the chosen runtime, int64; None without one.
    """

    layer: str
    cost: NDArray[np.float64]
    size: NDArray[np.int64]
    load: NDArray[np.float64] | None = None
    memory: NDArray[np.int64] | None = None

    @cached_property
    def useful(self) -> NDArray[np.int64]:
        """Ascending indices of the candidates that are non-dominated in (cost, bytes, load, memory).

        An optimal solution needs no dominated candidate. Computed once for all budgets.
        """
        further = [measure for measure in (self.load, self.memory) if measure is not None]
        return np.flatnonzero(pareto_front(self.cost, self.size, *further))


@dataclass(frozen=True)
class Group:
    """Activations that share a bit-width: the input of layers that read one tensor, or the operands of one product.

    Attributes:
        name: name of the tensor, or of the product.
        widths: ``(choices,)`` bit-widths.
        cost: ``(choices,)`` cost of the output with these activations alone quantized.
        operations: ``(choices,)`` bit operations per sample of the product itself; zeros for inputs of layers.
    """

    name: str
    widths: NDArray[np.int64]
    cost: NDArray[np.float64]
    operations: NDArray[np.float64]


@dataclass(frozen=True)
class WidthChoices:
    """The bit-widths of activations to choose from, and the compute budget.

    Attributes:
        groups: the groups of activations.
        group_of: index of the group that each layer reads, in the order of the layers.
        compute: largest number of bit operations per sample.
    """

    groups: Sequence[Group]
    group_of: Sequence[int]
    compute: float


@dataclass(frozen=True)
class SearchSpace:
    """All layers' candidates, read once from their tables.

    Attributes:
        choices: one per layer.
        rows: ``{layer: rows of its candidates}``, in the order of ``choices``.
    """

    choices: tuple[Choices, ...]
    rows: Mapping[str, Rows]

    @classmethod
    def from_tables(cls, tables: Iterable[tuple[str, pa.Table, pa.Table]]) -> SearchSpace:
        """Join candidates with their costs.

        Args:
            tables: layer, ``candidates`` table, ``sensitivity`` table, in the order of the layers.
        """
        joined = [choices_from_tables(*one) for one in tables]
        return cls(tuple(choices for choices, _ in joined), {choices.layer: rows for choices, rows in joined})

    def table(self, picked: Sequence[int]) -> pa.Table:
        """The chosen candidates as a table (``schemas.ALLOCATION``)."""
        return allocation_table(self.choices, picked, self.rows)


@dataclass(frozen=True)
class TableBudget:
    """How embedding tables with bit-widths to choose take part in a program.

    Attributes:
        counted: whether their bytes count: in budgets of the whole checkpoint.
        bounded: whether anything bounds them; else they have the largest bit-width.
    """

    counted: bool
    bounded: bool


Tables = Mapping[str, Mapping[str, Mapping[str, float]]]  # {table: {bits: {bytes, cost}}}


def table_choices(tables: Tables, budget: TableBudget) -> tuple[list[Choices], list[list[int]]]:
    """The choices of embedding tables, and the bit-widths that they stand for.

    Args:
        tables: bytes and costs by table and bit-width (step ``table_costs``).
        budget: how they take part.
    """
    choices, widths = [], []
    for name, found in tables.items():
        bits = sorted(map(int, found))
        bits = bits if budget.bounded else bits[-1:]
        rows = [found[str(width)] for width in bits]
        held = np.array([int(row["bytes"]) for row in rows], dtype=np.int64)
        size = held if budget.counted else np.zeros_like(held)
        choices.append(Choices(name, np.array([row["cost"] for row in rows]), size, np.zeros(len(rows)), held))
        widths.append(bits)
    return choices, widths


def smallest_tables(tables: Tables) -> int:
    """Bytes of all tables with the smallest bit-widths."""
    return sum(min(int(row["bytes"]) for row in found.values()) for found in tables.values())


def smallest_bytes(choices: Sequence[Choices]) -> int:
    """Bytes of the smallest allocation: the sum of the layers' smallest candidates."""
    return int(sum(int(layer.size.min()) for layer in choices))


def smallest_memory(choices: Sequence[Choices]) -> int | None:
    """Bytes of the layers in the chosen runtime's memory, at least; None without a runtime."""
    found = [None if layer.memory is None else int(layer.memory.min()) for layer in choices]
    return None if any(own is None for own in found) else sum(own for own in found if own is not None)


def require_bytes(choices: Sequence[Choices], budget_bytes: int, memory_bytes: int | None = None) -> None:
    """Refuse a budget below the smallest allocation.

    Raises:
        BudgetError: the budget is too small; the message names the smallest possible size.
        ValueError: memory is bounded, and a layer has none.
    """
    smallest = smallest_bytes(choices)
    if budget_bytes < smallest:
        raise BudgetError(
            f"budget of {byte_count(budget_bytes)} for the compressible layers is too small: "
            f"the smallest possible is {byte_count(smallest)}"
        )
    if memory_bytes is None:
        return
    least = smallest_memory(choices)
    if least is None:
        raise ValueError("memory is bounded, and a layer has none")
    if memory_bytes < least:
        raise BudgetError(
            f"{byte_count(memory_bytes)} of memory for the compressible layers are too few: "
            f"the smallest possible is {byte_count(least)}"
        )


def choices_from_tables(
    layer: str, candidates: pa.Table, sensitivity: pa.Table
) -> tuple[Choices, list[dict[str, Any]]]:
    """Join a layer's candidates with their global costs: the choices and their rows, in the same order."""
    by_id = {row["candidate_id"]: row for row in candidates.to_pylist()}
    rows = [by_id[name] for name in sensitivity["candidate_id"].to_pylist()]
    cost = sensitivity["global_cost"].to_numpy()
    size = np.array([row["bytes"] for row in rows], dtype=np.int64)
    memory = [row.get("memory") for row in rows]
    held = None if None in memory else np.array(memory, dtype=np.int64)
    return Choices(layer, cost, size, memory=held), rows


def allocation_table(choices: Sequence[Choices], picked: Sequence[int], rows: Mapping[str, Rows]) -> pa.Table:
    """The chosen candidates as a table (``schemas.ALLOCATION``).

    Args:
        choices: the layers and their candidates.
        picked: index of each layer's candidate.
        rows: ``{layer: rows of its candidates}``, in the order of ``choices``.
    """
    table = []
    for layer, index in zip(choices, picked, strict=True):
        row = rows[layer.layer][index]
        table.append(
            {
                "layer": layer.layer,
                "global_cost": float(layer.cost[index]),
                **{name: row[name] for name in ("candidate_id", *FIELDS, "bytes")},
            }
        )
    return pa.Table.from_pylist(table, schema=ALLOCATION)
