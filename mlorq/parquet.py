"""Parquet files, read by the calling thread alone.

``pyarrow.parquet.read_table`` lets Arrow's threads read a Python file. Now and then one of them still holds that file
when the interpreter ends, and ends the process with ``terminate called without an active exception`` and status 134.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Sequence


def open_parquet(source: Any) -> pq.ParquetFile:
    """A Parquet file, to be read with :func:`read_all` and :func:`read_group`.

    Args:
        source: the bytes of the file, or an open file.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: it is damaged.
    """
    # Without `pre_buffer`, one request per column chunk instead of one for the whole file, and no thread for them.
    return pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source, pre_buffer=False)


def read_all(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of all rows; all of them by default.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: the file is damaged.
    """
    return file.read(columns=None if columns is None else list(columns), use_threads=False)


def read_group(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    """Columns of one row group.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: the file is damaged.
    """
    return file.read_row_group(group, columns=list(columns), use_threads=False)


def read_parquet(source: Any) -> pa.Table:
    """The table of a Parquet file.

    Args:
        source: the bytes of the file, or an open file.

    Raises:
        pyarrow.ArrowException, OSError, ValueError: it is damaged.
    """
    return read_all(open_parquet(source))
