"""Reading Parquet: equal to pyarrow's own reader, and by the calling thread alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlorq.parquet import open_parquet, read_all, read_group, read_parquet


def test_the_table_is_that_of_pyarrow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"a": rng.normal(size=700), "b": [f"row {i}" for i in range(700)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=300, compression="zstd")
    data = (tmp_path / "t.parquet").read_bytes()
    assert read_parquet(data).equals(pq.read_table(io.BytesIO(data)), check_metadata=True)
    with open(tmp_path / "t.parquet", "rb") as file:
        assert read_parquet(file).equals(table)
    assert read_all(open_parquet(data), ["b"]).equals(table.select(["b"]))
    assert read_group(open_parquet(data), 1, ["a"]).equals(table.select(["a"]).slice(300, 300))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to list threads")
def test_no_thread_is_started(tmp_path: Path) -> None:
    # Threads of Arrow that hold a Python file end some processes with status 134 when the interpreter ends.
    pq.write_table(pa.table({f"column {i}": np.arange(2000.0) for i in range(6)}), tmp_path / "t.parquet")
    script = """
import os, sys
from mlorq.parquet import pa, read_parquet
before = len(os.listdir("/proc/self/task"))
read_parquet(open(sys.argv[1], "rb").read())
read_parquet(open(sys.argv[1], "rb"))
print(len(os.listdir("/proc/self/task")) - before)
"""
    run = [sys.executable, "-c", script, str(tmp_path / "t.parquet")]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == "0"
