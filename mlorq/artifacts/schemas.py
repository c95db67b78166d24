"""Arrow schemas of the Parquet tables in artifacts, and conversion of matrices to tables and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = pa.schema(
    [
        ("layer", pa.string()),
        ("kind", pa.string()),
        ("out_features", pa.int64()),
        ("in_features", pa.int64()),
        ("params", pa.int64()),
        ("macs", pa.int64()),
        ("order", pa.int64()),
        ("block", pa.int64()),
        ("groups", pa.int64()),
        ("input_group", pa.int64()),
        ("aliases", pa.list_(pa.string())),
    ]
)
CANDIDATES = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("form", pa.string()),
        ("bits", pa.int64()),
        ("bits_a", pa.int64()),
        ("bits_b", pa.int64()),
        ("rank", pa.int64()),
        ("bytes", pa.int64()),
        ("memory", pa.int64()),  # bytes in the memory of the chosen runtime; null without one
        ("local_cost", pa.float64()),
        ("on_front", pa.bool_()),
    ]
)
SENSITIVITY = pa.schema([("candidate_id", pa.string()), ("global_cost", pa.float64()), ("how", pa.string())])
FIRST_ORDER = SENSITIVITY.append(pa.field("first_order", pa.float64()))  # the cost before correction, null without one
ALLOCATION = pa.schema(
    [
        ("layer", pa.string()),
        ("candidate_id", pa.string()),
        ("form", pa.string()),
        ("bits", pa.int64()),
        ("bits_a", pa.int64()),
        ("bits_b", pa.int64()),
        ("rank", pa.int64()),
        ("bytes", pa.int64()),
        ("global_cost", pa.float64()),
    ]
)


def matrix_table(values: Tensor, column: str, index: Mapping[str, Tensor], dtype: pa.DataType) -> pa.Table:
    """A matrix as a table: one fixed-size list per row, after integer index columns.

    Args:
        values: ``(rows, width)``.
        column: name of the list column.
        index: the index columns by name, ``(rows,)`` each.
        dtype: element type of the lists.
    """
    array = values.detach().cpu().contiguous().numpy()
    flat = pa.array(array.reshape(-1).astype(dtype.to_pandas_dtype()), type=dtype)
    columns = {name: pa.array(tensor.cpu().numpy().astype(np.int64)) for name, tensor in index.items()}
    return pa.table({**columns, column: pa.FixedSizeListArray.from_arrays(flat, array.shape[1])})


def table_matrix(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-size list column as a matrix ``(rows, width)``."""
    chunked = table.column(column).combine_chunks()
    width = table.schema.field(column).type.list_size
    values: np.ndarray = chunked.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return values
