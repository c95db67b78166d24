"""Short programs end with status 0 on a busy machine: no thread of a library is cut off while it works."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

TURNS = int(os.environ.get("MLORQ_ENDINGS", "20"))
PROGRAM = """
import torch, mlorq
from torch import nn
torch.manual_seed(0)
def net():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
batches = [torch.randn(8, 16) for _ in range(4)]
result = mlorq.compress(net(), batches, budget="6bit", preset="quick", rounding="nearest")
result.save("out")
model = mlorq.load("out", model=net())
mlorq.export("out", "dense.safetensors")
print("done")
"""


def spin() -> None:
    while True:
        pass


@pytest.fixture
def busy() -> Iterator[None]:
    """Every core has another process to work for."""
    others = [
        multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)
    ]
    for other in others:
        other.start()
    yield
    for other in others:
        other.kill()
        other.join()


def test_programs_end_with_status_zero(busy: None, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for turn in range(TURNS):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "done\n"), (turn, done.returncode, done.stderr[-3000:])
