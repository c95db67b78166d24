"""Loops of many small kernels on a GPU: kernels of our own, and a step that is recorded once and replayed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache

import torch

OLDEST_GPU = (7, 0)  # compute capability that Triton compiles for
WARM_UP = 3  # steps before one is recorded: libraries and optimisers set themselves up in the first ones


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton can compile for a device: its launcher is C."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return False
    # Triton keeps what it compiles in the home folder; a container's is often read-only.
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
    return True


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A function that does what ``step`` does, faster after its first calls.

    Args:
        step: works on the current CUDA device, always on the same tensors, and never waits for it. What changes from
            step to step is in tensors that the caller fills.
    """
    calls = 0
    graph: torch.cuda.CUDAGraph | None = None

    def call() -> None:
        nonlocal calls, graph
        calls += 1
        if calls <= WARM_UP:
            step()
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads go on with their own work on the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        graph.replay()

    return call
